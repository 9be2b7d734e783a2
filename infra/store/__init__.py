"""Storage: one small interface over a local folder and an S3 prefix.

`store.Store` is the door; `disk` and `s3` are its backends.
"""
