"""Faults on a running pipeline, drawn from a seed: ``python -m cluster.testing.chaos --minutes 10 --seed 1``."""
