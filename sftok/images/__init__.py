"""Images: decoding, preprocessing, and reading image Parquet in memory, as stored, or as a stream.

`dataset` holds a split in memory, `stream` reads one larger than memory, `preprocess` defines what a model sees.
"""
