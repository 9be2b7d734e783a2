"""Images: decoding, preprocessing, and reading image Parquet in memory, lazily or as a stream.

`dataset` holds a split in memory, `lazy` reads one on demand, `stream` feeds training from one larger than memory,
`preprocess` defines the pixels that a model sees, with `decode` and `resize_and_crop`; `contract` the format of image
Parquet.
"""
