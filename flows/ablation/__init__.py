"""Ablations: variants of one recipe, trained with several seeds, and the page that compares them.

`flow.ablation` is the Prefect flow.
"""
