"""Resize images to Inception's 299 x 299 pixels. Each way belongs to a protocol; FIDs of different ways never compare.

All take uint8 (B, 3, H, W) and return float32 (B, 3, 299, 299) on the scale of pixels, not rounded, since resized
images are not saved to files.
"""

import functools
from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

SIDE = 299
Resize = Literal["tensorflow_bilinear", "pillow_bicubic", "torch_bilinear", "torch_bilinear_antialias"]


def resize(images_B3HW: Tensor, how: Resize) -> Tensor:
    """Resize images for Inception.

    Args:
        images_B3HW: uint8 RGB.
        how: `tensorflow_bilinear` is that of torch-fidelity and of ADM's graph; `pillow_bicubic` is clean-fid's;
            `torch_bilinear` is pytorch-fid's; `torch_bilinear_antialias` is torchmetrics' default.

    Raises:
        ValueError: the images are not uint8 RGB.
    """
    if images_B3HW.dtype != torch.uint8 or images_B3HW.ndim != 4 or images_B3HW.shape[1] != 3 or not len(images_B3HW):
        raise ValueError(f"images are {images_B3HW.dtype} {tuple(images_B3HW.shape)}: give uint8 (n, 3, H, W)")
    return _WAYS[how](images_B3HW)


def _tensorflow_bilinear(images_B3HW: Tensor) -> Tensor:
    """Resize by TensorFlow 1's bilinear, to the bit: no antialiasing; pixel 0 is on pixel 0, not centre on centre."""
    return _between(_between(images_B3HW.float(), 3), 2)


def _between(x: Tensor, dim: int) -> Tensor:
    """Interpolate linearly along one dimension."""
    last = x.shape[dim] - 1
    where = torch.arange(SIDE, dtype=torch.float32, device=x.device) * np.float32(x.shape[dim] / SIDE).item()
    below = where.long()
    shares = (where - below).view([-1 if i == dim else 1 for i in range(x.ndim)])
    low = x.index_select(dim, below)
    return x.index_select(dim, (below + 1).clamp(max=last)).sub_(low).mul_(shares).add_(low)


def _pillow_bicubic(images_B3HW: Tensor) -> Tensor:
    """Resize each channel by Pillow's bicubic, which is antialiased, in float32; overshoots are clamped."""
    if images_B3HW.is_cuda:
        return pillow_bicubic_products(images_B3HW)
    planes = images_B3HW.cpu().flatten(0, 1).numpy().astype(np.float32)
    resized = [np.asarray(Image.fromarray(plane).resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for plane in planes]
    pixels = torch.from_numpy(np.stack(resized)).clamp_(0, 255)
    return pixels.unflatten(0, (-1, 3)).to(images_B3HW.device)


def pillow_bicubic_products(images_B3HW: Tensor) -> Tensor:
    """Resize by Pillow's bicubic as matrix products, on any device: Pillow's numbers but for the last bit of some.

    Pillow sums in float64 and rounds to float32 between rows and columns; matrix products sum in another order.
    """
    across_WS, down_HS = (pillow_weights(side).to(images_B3HW.device) for side in reversed(images_B3HW.shape[2:]))
    rows = (images_B3HW.double() @ across_WS).float()
    return (down_HS.T @ rows.double()).float().clamp_(0, 255)


@functools.cache
def pillow_weights(side: int) -> Tensor:
    """Compute the weights float64 (side, 299) of Pillow's bicubic filter from `side` to 299 pixels.

    As ImagingResample: the filter of support 2, a = -0.5, widened by the scale if the image shrinks, cut off at the
    borders and normalised to sum 1.
    """
    scale = side / SIDE
    wide = max(scale, 1.0)
    weights = np.zeros((side, SIDE))
    for at in range(SIDE):
        centre = (at + 0.5) * scale
        first, last = max(int(centre - 2 * wide + 0.5), 0), min(int(centre + 2 * wide + 0.5), side)
        x = np.abs((np.arange(first, last) - centre + 0.5) / wide)
        near, far = (1.5 * x - 2.5) * x * x + 1, -0.5 * (((x - 5) * x + 8) * x - 4)
        filtered = np.where(x < 1, near, np.where(x < 2, far, 0.0))
        weights[first:last, at] = filtered / filtered.sum()
    return torch.from_numpy(weights)


def _torch_bilinear(images_B3HW: Tensor) -> Tensor:
    # pytorch-fid maps [0, 255] to [-1, 1], TensorFlow's graph to [-1, 1); 256 / 255 lets one network serve both.
    return F.interpolate(images_B3HW.float(), (SIDE, SIDE), mode="bilinear", align_corners=False) * (256 / 255)


def _torch_bilinear_antialias(images_B3HW: Tensor) -> Tensor:
    size = (SIDE, SIDE)
    return F.interpolate(images_B3HW.float(), size, mode="bilinear", align_corners=False, antialias=True)


_WAYS: dict[Resize, Callable[[Tensor], Tensor]] = {
    "tensorflow_bilinear": _tensorflow_bilinear,
    "pillow_bicubic": _pillow_bicubic,
    "torch_bilinear": _torch_bilinear,
    "torch_bilinear_antialias": _torch_bilinear_antialias,
}
assert set(_WAYS) == set(get_args(Resize))
