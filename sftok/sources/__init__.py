"""Sources of images: folders, tar shards, Parquet, and indexes, on disk or on S3.

`sources.list_source` opens any of them; every kind has a module of its own.
"""
