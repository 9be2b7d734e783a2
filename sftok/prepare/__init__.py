"""Preparing a dataset: from a source of images to verified shards of image Parquet.

`prepare.prepare` does it; `plan` and `deal` assign entries to shards, `shard` writes one.
"""
