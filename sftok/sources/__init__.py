"""Sources of images: folders, tar shards, Parquet and indexes, on disk or on S3.

`sources.list_source` lists any of them, `sources.check_source` checks one beforehand. Each kind has a module of its
own: `folder`, `tar`, `parquet`, `index`, `digits`; they share `rules`, `class_ids`, `columns`, `patterns` and
`containers`.
"""
