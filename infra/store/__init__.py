"""Storage: one small interface over a local folder or an S3 prefix.

`store.Store` is the interface; `disk` and `s3` are its backends, which sources of images are read through, too.
`location` parses paths and URIs.
"""
