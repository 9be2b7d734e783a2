"""Ablations: one recipe trained in several ways with several seeds, and the page that compares them.

`flow.ablation` is the Prefect flow.
"""
