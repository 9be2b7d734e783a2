"""Collect per-image metrics of images that stream past, without keeping the images.

Metrics stay on the images' device until they are read, so that nothing waits for a GPU.
"""

import torch
from torch import Tensor

from sftok.metrics import functional


class ImageMeter:
    """Metrics of images by name, in the order of the images."""

    def __init__(self) -> None:
        self.count = 0
        self._parts: dict[str, list[Tensor]] = {}

    def add(self, **metrics: Tensor) -> None:
        """Add metrics (n, ...) of the next images; the same names in every call."""
        assert not self._parts or self._parts.keys() == metrics.keys()
        for name, part in metrics.items():
            self._parts.setdefault(name, []).append(part)
        self.count += len(next(iter(metrics.values())))

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def __getitem__(self, name: str) -> Tensor:
        """Return a metric of all images so far, on the CPU."""
        return torch.cat(self._parts[name]).cpu()

    def mean(self, name: str) -> float:
        """Return the mean of a metric (n) over all images so far, in float64, summed part by part."""
        return float(sum(part.double().sum() for part in self._parts[name])) / self.count


def pair_metrics(images_BCHW: Tensor, originals_BCHW: Tensor) -> dict[str, Tensor]:
    """Compute PSNR, SSIM, L1 and L2 of images, (B) float64 each, on their device."""
    return {
        "psnr": functional.psnr(images_BCHW, originals_BCHW),
        "ssim": functional.ssim(images_BCHW, originals_BCHW),
        "l1": functional.l1(images_BCHW, originals_BCHW),
        "l2": functional.l2(images_BCHW, originals_BCHW),
    }
