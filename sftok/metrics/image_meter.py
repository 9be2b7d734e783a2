"""What is measured of images as they pass, some at a time: a row of figures an image, and not the images themselves.

Rows lie where the images do until they are asked for, so that nothing waits for a GPU.
"""

import torch
from torch import Tensor

from sftok.metrics import functional


class ImageMeter:
    """Figures of images by name, in the order in which the images came."""

    def __init__(self) -> None:
        self.count = 0
        self._parts: dict[str, list[Tensor]] = {}

    def add(self, **figures: Tensor) -> None:
        """Note figures (n, ...) of the next images; the same names every time."""
        assert not self._parts or self._parts.keys() == figures.keys()
        for name, part in figures.items():
            self._parts.setdefault(name, []).append(part)
        self.count += len(next(iter(figures.values())))

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def __getitem__(self, name: str) -> Tensor:
        """The figures of all images so far, on the CPU."""
        return torch.cat(self._parts[name]).cpu()


def pair_figures(images_BCHW: Tensor, originals_BCHW: Tensor) -> dict[str, Tensor]:
    """PSNR, SSIM, L1 and L2 of images, (B) float64 each, on their device."""
    return {
        "psnr": functional.psnr(images_BCHW, originals_BCHW),
        "ssim": functional.ssim(images_BCHW, originals_BCHW),
        "l1": functional.l1(images_BCHW, originals_BCHW),
        "l2": functional.l2(images_BCHW, originals_BCHW),
    }
