"""The long measurements: the source documents' experiments, cost curves, an ablation and a model fed by them.

``python -m benchmarks.experiments`` runs them all, with names only those; each replaces its own section of
``results/full.json``, and the report is made of what is there.
"""
