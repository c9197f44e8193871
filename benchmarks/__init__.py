"""Benchmarks: what the pipeline costs, as ratios within one run. ``python -m benchmarks`` runs them all."""
