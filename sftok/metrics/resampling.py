"""Confidence intervals of scores, and extrapolation to infinitely many samples, by subsets without replacement.

Legend: N samples, b samples per subset, D feature dimensions.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sftok.metrics.frechet import FeatureRows, Gaussian, frechet

POINTS = 15  # sizes of an extrapolation, evenly spaced
SMALLEST_SHARE = 10  # from a tenth of the samples to all: 5,000 to 50,000 of 50,000, as published
Z95 = 1.959963984540054  # two-sided 95 % of a normal distribution


def subset(draws: np.random.RandomState, count: int, size: int) -> Tensor:
    """Draw the indices of `size` of `count` samples without replacement, (size), in the order of the draw.

    By RandomState, whose stream NumPy guarantees never to change, and which torch-fidelity uses.
    """
    return torch.from_numpy(draws.choice(count, size, replace=False))


class Interval(NamedTuple):
    """The 95 % interval of a value by resampling."""

    low: float
    high: float
    method: str


def interval(value: float, measure: Callable[[Tensor], float], count: int, *, replicates: int, seed: int) -> Interval:
    """Compute the 95 % interval of a value by subsampling halves without replacement (Politis & Romano 1994).

    Args:
        value: of all rows.
        measure: maps the rows of a subsample to its value.
        count: number of rows.
        replicates: number of subsamples.
        seed: of the draws.

    Raises:
        ValueError: there are fewer than 4 rows or 2 replicates.
    """
    size = count // 2
    if size < 2 or replicates < 2:
        raise ValueError(f"an interval from {replicates} halves of {count} rows: give at least 2, of 4")
    draws = np.random.RandomState(seed)
    values = [measure(subset(draws, count, size)) for _ in range(replicates)]
    return spread(value, float(np.std(values, ddof=1)), f"{replicates} subsamples", size, count, seed)


def spread(value: float, deviation: float, what: str, size: int, count: int, seed: int) -> Interval:
    """Compute the interval from the deviation between subsets.

    Subsets of b of N vary about their mean by 1/b - 1/N of a row's variance, the whole by 1/N of it. Only their
    deviation is used, since their mean may have another bias than the value of the whole.
    """
    half = Z95 * deviation * (size / (count - size)) ** 0.5
    method = (
        f"value +- 1.96 standard deviations between {what} of {size} of {count} without replacement, seed {seed}, "
        "times sqrt(b / (N - b))"
    )
    return Interval(value - half, value + half, method)


class Extrapolation(NamedTuple):
    """A value that is linear in 1/N, extrapolated to infinitely many samples, with the points of the fit."""

    value: float
    slope: float
    sizes: tuple[int, ...]
    values: tuple[float, ...]
    seed: int

    @property
    def method(self) -> str:
        """The method in words, for the protocol."""
        return (
            f"least squares in 1/N over {len(self.sizes)} subsets of {self.sizes[0]} to {self.sizes[-1]} samples "
            f"without replacement, seed {self.seed}; the reference is kept whole (Chong & Forsyth 2020)"
        )


def extrapolate(
    features_ND: Tensor, reference: Gaussian | FeatureRows, *, seed: int, points: int = POINTS
) -> Extrapolation:
    """Extrapolate the Fréchet distance linearly in 1/N to infinitely many samples ("FID infinity").

    The expected distance has a bias in 1/N that depends on the samples themselves, so even two sets of the same N do
    not compare. Each size has a subset of its own.

    Raises:
        ValueError: there are fewer than 20 samples or 2 points.
    """
    count = len(features_ND)
    smallest = count // SMALLEST_SHARE
    if smallest < 2 or points < 2:
        raise ValueError(f"an extrapolation over {points} sizes needs {2 * SMALLEST_SHARE} samples, there are {count}")
    draws = np.random.RandomState(seed)
    sizes = sorted({int(size) for size in np.linspace(smallest, count, points)})
    values = [frechet(features_ND[subset(draws, count, size)], reference) for size in sizes]
    slope, value = np.polyfit(1 / np.array(sizes, dtype=np.float64), np.array(values), 1)
    return Extrapolation(float(value), float(slope), tuple(sizes), tuple(values), seed)
