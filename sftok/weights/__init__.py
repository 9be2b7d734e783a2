"""Weights of tokenizers and teachers: saving, loading, and converting published checkpoints.

`artifacts` reads and writes this project's layout; `convert` reads and writes the published one (`load_published`,
`to_published`), by `layout` and `config`.
"""
