"""Persist's files keep what was committed: shown by killed processes and by replayed power cuts, at any moment.

    python -m tests.chaos.crash --runs 1000 --seed 1

`source` says what was sent, `lane` drives persist's files as its actor does, `reader` reads them back with plain h5py.
`kills` ends real processes with SIGKILL; `recorder`, `disk` and `cuts` record every disk operation and replay what a
power cut could have left of them.
"""
