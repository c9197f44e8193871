"""The protocol without sockets: the real stages against a model of JetStream, on one virtual clock, out of one seed.

`python -m cluster.testing.sim --seeds 1000` runs a thousand clusters that are killed, frozen, cut off and lied to, and
holds each against the checker. A failing seed replays exactly: ``--seed N --trace``.

- `loop`: the virtual clock, and processes that freeze.
- `streams`, `broker`, `api`: the model of JetStream; `tests/simulation` holds its answers against real servers.
- `network`: a client of it, and all that can go wrong on the way.
- `disk`: persist's files in memory, with what a killed process and a power cut leave of them.
- `load`, `faults`, `run`: what is published, what is broken, and one whole run.
"""
