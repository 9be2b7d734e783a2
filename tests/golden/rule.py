"""The inputs behind the golden vectors: weights and images are defined by rule, so no weights need to be stored.

`weights(shapes)` builds a state dict in the published layout from the name -> shape map in NAME.shapes.json;
`images(n)` builds the n input images. Both are bit-exact on any machine with NumPy's PCG64.
"""

import json
import math
import zlib

import numpy as np


def weight(name: str, shape: list[int]) -> np.ndarray:
    """float32 array of `shape`, seeded by CRC-32 of `name`: vectors are 1 + 0.1 n (names ending in 'weight') or 0.1 n,
    everything else n / sqrt(fan_in), with n standard normal and fan_in the product of all dimensions but the first."""
    n = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()))).standard_normal(shape, dtype=np.float32)
    if len(shape) == 1:
        return (1 + 0.1 * n if name.endswith("weight") else 0.1 * n).astype(np.float32)
    n /= math.sqrt(np.prod(shape[1:]))  # in place: copies of the largest cost as much as their numbers
    return n


def weights(shapes_json: str) -> dict[str, np.ndarray]:
    """State dict for a NAME.shapes.json; `quantize.index_offset` (int64) is [0]."""
    with open(shapes_json) as file:
        shapes = json.load(file)
    return {k: np.zeros(s, np.int64) if k.endswith("index_offset") else weight(k, s) for k, s in shapes.items()}


def images(n: int, size: int = 256) -> np.ndarray:
    """(n, 3, size, size) float32 in [0, 1]: smooth sums of sinusoids."""
    y, x = np.meshgrid(np.linspace(0, 1, size), np.linspace(0, 1, size), indexing="ij")
    rows = [
        [
            0.5
            + 0.25 * np.sin(2 * np.pi * ((i + 1) * x + (c + 1) * y))
            + 0.25 * np.cos(2 * np.pi * ((c + 2) * x * y * (i + 1)))
            for c in range(3)
        ]
        for i in range(n)
    ]
    return np.asarray(rows, dtype=np.float32)
