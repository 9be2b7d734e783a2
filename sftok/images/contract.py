"""The format of image Parquet: its metadata key, its splits, and the class id of images without a class."""

METADATA_KEY = b"sftok"  # of the schema: JSON with class_names (null: no labels) and split
SPLITS = ("train", "val")
NO_CLASS = -1
