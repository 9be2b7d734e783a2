"""Inference: sampling images from trained generators, and reconstructing images with trained tokenizers.

`sample` and `reconstruct` are what the commands of these names call.
"""
