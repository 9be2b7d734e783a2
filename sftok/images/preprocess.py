"""Preprocess image bytes to the pixels that a model sees: one decoding, one resize, seeded augmentation.

Training, encoding and evaluation share these functions, so a code means the same image everywhere. A change of the
pixels that they produce needs another name in `PREPROCESSING`, which is part of an artifact's identity.
"""

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from infra.compute.transfer import send
from sftok.config import AugmentConfig
from sftok.images.decode import UnreadableImageError, to_rgb
from sftok.images.resize_and_crop import offset, resized
from sftok.images.views import variant_name

__all__ = [
    "PREPROCESSING",
    "PREPROCESSINGS",
    "UnreadableImageError",
    "affine",
    "augment",
    "crop",
    "resize_shorter",
    "ten_crop",
    "to_float",
    "to_rgb",
    "uniforms",
    "variant_name",
]

PREPROCESSING = "resize-bicubic-antialias-crop/1"
PREPROCESSINGS = {"pil": PREPROCESSING, "torchcodec": "torchcodec-resize-bicubic-antialias-crop/1"}
"""Names by decoder of `encode`: pil is `decode`, torchcodec is `decode_on_device`."""


def resize_shorter(image: Image.Image, size: int) -> torch.Tensor:
    """Resize so that the shorter side is `size` pixels, with antialiased bicubic; uint8 (3, H, W).

    Equals torchvision's Resize on PIL images. What is longer than 4:1 is cut around the centre.
    """
    return torch.from_numpy(np.array(resized(image, size))).permute(2, 0, 1).contiguous()


def crop(image: torch.Tensor, size: int, where: float | None = None) -> torch.Tensor:
    """Cut a square out of (3, H, W): at the centre, as torchvision's CenterCrop, or by a draw `where` in [0, 1)."""
    top, left = offset(image.shape[1] - size, where), offset(image.shape[2] - size, where)
    return image[:, top : top + size, left : left + size]


def ten_crop(images: torch.Tensor, size: int, number: int) -> torch.Tensor:
    """Cut the view crop-`number` (1 to 10), (..., size, size), of images (..., H, W), as torchvision's TenCrop."""
    height, width = images.shape[-2] - size, images.shape[-1] - size
    places = (0, 0), (0, width), (height, 0), (height, width), (offset(height, None), offset(width, None))
    turn, place = divmod(number - 1, len(places))
    top, left = places[place]
    mirrored = images.flip(-1) if turn else images
    return mirrored[..., top : top + size, left : left + size]


def to_float(images: torch.Tensor) -> torch.Tensor:
    """Convert uint8 images to float32 in [0, 1], equal on every device; the only place where this is done."""
    # Divided by a tensor on their device: for a Python number, CUDA would multiply by its rounded inverse.
    return images.to(torch.float32).div_(torch.full((), 255.0, device=images.device))


def uniforms(*key: str | int) -> tuple[float, ...]:
    """Draw eight numbers in [0, 1) from a key alone: equal on every machine and rank and in every batch."""
    digest = hashlib.sha512("\0".join(map(str, key)).encode()).digest()
    return tuple(int.from_bytes(digest[at : at + 8], "big") / 2**64 for at in range(0, 64, 8))


def augment(images: torch.Tensor, config: AugmentConfig, draws: Sequence[Sequence[float]]) -> torch.Tensor:
    """Augment each image by its own draws: an affine change within the config's bounds, then a mirroring for half.

    Args:
        images: float32 (n, 3, S, S).
        config: bounds of the changes.
        draws: `uniforms` of each image.

    Returns:
        float32 (n, 3, S, S) within the range of the input.
    """
    if config.is_affine:
        images = affine(images, config, draws)
    if config.flip:
        mirrored = send(torch.tensor([draw[4] < 0.5 for draw in draws]), images.device)
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    return images


def affine(images: torch.Tensor, config: AugmentConfig, draws: Sequence[Sequence[float]]) -> torch.Tensor:
    """Rotate, zoom and shift each image (n, 3, S, S), bilinear; pixels from outside repeat the border."""
    coefficients = torch.tensor([_inverse_affine(config, draw) for draw in draws], dtype=torch.float64)
    coefficients, size = send(coefficients, images.device), images.shape[-1]
    at = (torch.arange(size, dtype=torch.float64, device=images.device) * 2 + 1) / size - 1
    # Element by element: the matrix product in F.affine_grid may round differently with the size of the batch.
    a, b, c, d, e, f = (column[:, None, None] for column in coefficients.unbind(1))
    x, y = at[None, None, :], at[None, :, None]
    grid = torch.stack((a * x + b * y + c, d * x + e * y + f), dim=-1).to(images.dtype)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _inverse_affine(config: AugmentConfig, draw: Sequence[float]) -> tuple[float, ...]:
    """Return the inverse map of output points in coordinates from -1 to 1: x' = a x + b y + c, y' = d x + e y + f."""
    angle = math.radians(config.rotate) * (2 * draw[0] - 1)
    zoom = 1 + config.zoom * (2 * draw[1] - 1)
    shift_x, shift_y = (2 * config.shift * (2 * u - 1) for u in draw[2:4])
    cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
    return (cos, sin, -cos * shift_x - sin * shift_y, -sin, cos, sin * shift_x - cos * shift_y)
