"""The arithmetic of an evaluation at a stated scale, of synthetic features and images; and what ImageNet would take.

ImageNet has 1,281,167 training images, 50,000 validation images, and 50,000 samples: times here are scaled by the rows
that a part looks at, or by their pairs where it compares each with each.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from sftok.metrics.frechet import Gaussian, distance
from sftok.metrics.functional import FeatureMoments, psnr, ssim
from sftok.metrics.nearest import nearest_distances
from sftok.metrics.scores import precision_recall
from tests.benchmarks.device import models
from tests.benchmarks.device.bench import Bench

TRAIN, SAMPLES = 1_281_167, 50_000  # of ImageNet
LOOKED_FOR = 2_000  # samples and held-out images whose nearest training image is looked for


class Scale(NamedTuple):
    """How much of it is measured."""

    dims: int
    rows: int
    queries: int
    images: int


FULL, QUICK = Scale(2048, 51_200, 10_240, 512), Scale(64, 512, 128, 16)


def run(bench: Bench) -> None:
    """Moments, distance, precision and recall, nearest training images, SSIM and PSNR."""
    scale = QUICK if bench.is_quick else FULL
    torch.manual_seed(0)
    features = torch.randn(scale.rows, scale.dims).relu().to(bench.device)
    queries = (torch.randn(scale.queries, scale.dims) + 0.1).relu().to(bench.device)
    some = queries[: len(queries) // 4]
    images = models.images(bench, scale.images)
    pixels = (images * 255).to(torch.uint8)
    sides = [Gaussian.of(FeatureMoments.of(side)) for side in (features, queries)]
    pairs = scale.rows * len(some)
    measure(bench, "moments", lambda: FeatureMoments.of(features), scale.rows, "rows/s", TRAIN)
    measure(
        bench, "Frechet distance", lambda: distance(sides[1], Gaussian(sides[0].mean, sides[0].covariance)), 1, "1/s", 1
    )
    measure(bench, "precision and recall", lambda: precision_recall(some, some), len(some) ** 2, "pairs/s", SAMPLES**2)
    measure(
        bench,
        "nearest of features",
        lambda: nearest_distances([some], features, bench.device.type),
        pairs,
        "pairs/s",
        TRAIN * SAMPLES,
    )
    on_host = pixels.cpu()  # as training images are, which are read a batch at a time
    few = pixels[: min(64, scale.images // 2)]
    measure(
        bench,
        "nearest of images",
        lambda: nearest_distances([few], on_host, bench.device.type),
        len(few) * len(pixels),
        "pairs/s",
        TRAIN * LOOKED_FOR,
    )
    measure(bench, "SSIM", lambda: ssim(images, images.flip(0)), scale.images, "images/s", SAMPLES)
    measure(bench, "PSNR", lambda: psnr(images, images.flip(0)), scale.images, "images/s", SAMPLES)


def measure(bench: Bench, name: str, work: Callable[[], object], items: int, unit: str, whole: int) -> None:
    """One part, its first call left out."""

    def timed() -> None:
        speed = items / bench.seconds(work, rounds=1, warm=1)
        bench.put(
            f"{name} ({items:,} {unit.removesuffix('/s')})",
            speed,
            unit,
            note=f"{whole / speed:,.1f} s at ImageNet's size",
        )

    bench.attempt(name, timed)
