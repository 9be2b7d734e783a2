"""Code Parquet: the format between tokenizers and generators, written and verified in one place."""
