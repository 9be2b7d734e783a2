"""Weights of tokenizers and teachers: saving, loading, and converting published checkpoints.

`artifacts` reads and writes ours, `convert.load_published` reads published ones.
"""
