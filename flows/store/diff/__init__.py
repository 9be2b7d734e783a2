"""Comparing the codes of two tokenizers on the same images.

`diff.diff` reads them shard by shard, `tally` counts, `shown` prints.
"""
