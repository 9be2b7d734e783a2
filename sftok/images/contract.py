"""The format of image Parquet: what its metadata is called, its splits, and images without a class."""

METADATA_KEY = b"sftok"
SPLITS = ("train", "val")
NO_CLASS = -1
