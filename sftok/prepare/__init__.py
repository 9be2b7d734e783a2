"""Preparing a dataset: from a source of images to shards of image Parquet.

`prepare.prepare` writes them; `plan` and `deal` assign entries to shards, `shard` writes one, `verify` checks them.
"""
