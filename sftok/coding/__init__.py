"""Encoding images to codes, shard by shard, and decoding codes to images.

`encode.encode` encodes a dataset with Ray workers (`groups`, `shard`), `decode.ImageDecoder` decodes codes.
"""
