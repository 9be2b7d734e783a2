"""Comparing the codes of two tokenizers on the same images.

`diff.diff` reads them shard by shard, `compare_rows` pairs rows of the same image, `agreement` counts, `render` prints.
"""
