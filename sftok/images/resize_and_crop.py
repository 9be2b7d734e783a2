"""Resize images and cut squares out of them: part of `PREPROCESSING` (see `preprocess`); needs no torch."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# A 1 x 80,000,000 image passes every pixel limit and would be resized to 256 x 20,480,000,000, so it is cut first.
LONGEST_SIDE = 4
Pixels = NDArray[np.uint8]


def resized(image: Image.Image, size: int) -> Image.Image:
    """Resize so that the shorter side is `size` pixels, with antialiased bicubic.

    Equals torchvision's Resize on PIL images. What is longer than 4:1 is cut around the centre.
    """
    width, height = image.size
    shorter = min(width, height)
    full = (size * width // shorter, size * height // shorter)
    new = (min(full[0], LONGEST_SIDE * size), min(full[1], LONGEST_SIDE * size))
    left, top = (full[0] - new[0]) // 2, (full[1] - new[1]) // 2
    box = (
        left * width / full[0],
        top * height / full[1],
        (left + new[0]) * width / full[0],
        (top + new[1]) * height / full[1],
    )
    return image.resize(new, Image.Resampling.BICUBIC, box=box)


def offset(room: int, where: float | None) -> int:
    """Return where a crop begins that leaves `room` pixels: in the middle, or by a draw `where` in [0, 1)."""
    return round(room / 2) if where is None else int(where * (room + 1))


def square(image: Image.Image, side: int, where: float | None = None) -> Pixels:
    """Cut a square out of an image, (3, side, side): at the centre, as torchvision's CenterCrop, or by a draw."""
    left, top = offset(image.width - side, where), offset(image.height - side, where)
    return np.asarray(image.crop((left, top, left + side, top + side))).transpose(2, 0, 1)
