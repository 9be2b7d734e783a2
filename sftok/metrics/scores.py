"""Metrics of features other than the Fréchet distance: Inception Score, KID, precision, recall, density and coverage.

Each follows the definition of its paper, in float64 and by blocks: memory does not grow with the number of pairs.

Legend: N samples, R references, D feature dimensions, K classes.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sftok.metrics.resampling import subset

BLOCK = 2048  # rows whose distances from as many others are in memory at once: 32 MB
_TIE = 1e-12  # squared distances that differ by less, relative to the features' squared lengths, count as equal


class Estimate(NamedTuple):
    """Mean over parts of the data, and the standard deviation between the parts (biased, as the tools print it)."""

    value: float
    deviation: float


def inception_score(logits_NK: Tensor, splits: list[Tensor]) -> Estimate:
    """Compute the Inception Score, in [1, K] (Salimans et al. 2016): confidence and variety of a classifier's outputs.

    Per split, exp of the mean KL divergence of a sample's probabilities from their mean; averaged over splits.

    Args:
        logits_NK: classifier outputs, in torch-fidelity and ADM without the bias.
        splits: rows of each split, by `equal_splits` or `splits_of`.

    Raises:
        ValueError: there are no samples, a split is empty, or logits are NaN or infinite.
    """
    _check(logits_NK, 1, "logits")
    scores = []
    for rows in splits:
        if not len(rows):
            raise ValueError(f"{len(splits)} splits of {len(logits_NK)} samples leave one empty: use fewer splits")
        logits = logits_NK[rows].double()
        logs = logits.log_softmax(1)
        shares = logs.exp()
        divergence = (shares * (logs - shares.mean(0, keepdim=True).log())).sum(1)
        scores.append(divergence.mean().exp().item())
    return Estimate(float(np.mean(scores)), float(np.std(scores)))


def equal_splits(count: int, splits: int, seed: int | None) -> list[Tensor]:
    """Divide rows into `splits` nearly equal splits, shuffled by a seed or in order, as torch-fidelity does."""
    order = np.arange(count) if seed is None else np.random.RandomState(seed).permutation(count)
    ends = [i * count // splits for i in range(splits + 1)]
    return [torch.from_numpy(order[start:end]) for start, end in pairwise(ends)]


def splits_of(count: int, size: int) -> list[Tensor]:
    """Divide rows in order into splits of one size, the last of which may be smaller, as ADM does."""
    return list(torch.arange(count).split(size))


def kernel_distance(
    samples_ND: Tensor,
    references_RD: Tensor,
    *,
    subsets: int,
    subset_size: int,
    seed: int,
    reference_first: bool = False,
) -> Estimate:
    """Compute KID, the squared maximum mean discrepancy with the kernel (x'y / D + 1)^3 (Binkowski et al. 2018).

    Averaged over subsets. Unbiased: pairs of a sample with itself are excluded, so the value may be negative.

    Args:
        samples_ND: features of the samples.
        references_RD: features of the references.
        subsets: number of pairs of subsets, each drawn without replacement.
        subset_size: samples, and references, per subset.
        seed: of the draws.
        reference_first: draw the references of a subset before its samples, as clean-fid does; others draw them after.

    Raises:
        ValueError: there are fewer samples or references than a subset needs, or features are NaN or infinite.
    """
    _check_pair(samples_ND, references_RD, 2)
    fewest = min(len(samples_ND), len(references_RD))
    if not 2 <= subset_size <= fewest or subsets < 1:
        raise ValueError(
            f"KID over {subsets} subsets of {subset_size}: there are {len(samples_ND)} samples and "
            f"{len(references_RD)} references; a subset takes 2 to {fewest}"
        )
    draws = np.random.RandomState(seed)
    sides = (samples_ND, references_RD)
    values = []
    for _ in range(subsets):
        drawn = {}
        for which in (1, 0) if reference_first else (0, 1):
            drawn[which] = sides[which][subset(draws, len(sides[which]), subset_size)].double()
        values.append(_discrepancy(drawn[0], drawn[1]))
    return Estimate(float(np.mean(values)), float(np.std(values)))


def _discrepancy(x_ND: Tensor, y_ND: Tensor) -> float:
    count = len(x_ND)
    within = sum(_kernel(side, side).sum() - _kernel_of_self(side).sum() for side in (x_ND, y_ND))
    return float(within / (count * (count - 1)) - 2 * _kernel(x_ND, y_ND).mean())


def _kernel(x_ND: Tensor, y_ND: Tensor) -> Tensor:
    return (x_ND @ y_ND.T / x_ND.shape[1] + 1) ** 3


def _kernel_of_self(x_ND: Tensor) -> Tensor:
    return (x_ND.square().sum(1) / x_ND.shape[1] + 1) ** 3


class PrecisionRecall(NamedTuple):
    """Booleans: each sample is near a reference (N), each reference near a sample (R); their means are the metrics."""

    near_reference: Tensor
    near_sample: Tensor

    @property
    def precision(self) -> float:
        """Share of samples, in [0, 1]."""
        return self.near_reference.double().mean().item()

    @property
    def recall(self) -> float:
        """Share of references, in [0, 1]."""
        return self.near_sample.double().mean().item()


def precision_recall(samples_ND: Tensor, references_RD: Tensor, k: int = 3) -> PrecisionRecall:
    """Compute improved precision and recall (Kynkäänniemi et al. 2019).

    A sample counts if it is closer to some reference than that reference's k-th nearest other reference; recall is the
    same with the sides exchanged. Deviates: ADM compares in float16 where that is finite, so one pair in a thousand may
    be decided differently; here distances are float64.

    Raises:
        ValueError: a side has fewer than k + 1 features, or features are NaN, infinite or of different dimensions.
    """
    _check_pair(samples_ND, references_RD, k + 1)
    samples, references = _centred(samples_ND, references_RD)
    sample_radii, reference_radii = _radii(samples, k), _radii(references, k)
    near_reference = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    near_sample = torch.zeros(len(references), dtype=torch.bool, device=samples.device)
    for rows, columns, squares, tie in _pairs(samples, references):
        near_reference[rows] |= (squares <= reference_radii[columns] + tie).any(1)
        near_sample[columns] |= (squares <= sample_radii[rows, None] + tie).any(0)
    return PrecisionRecall(near_reference, near_sample)


class DensityCoverage(NamedTuple):
    """Neighbourhoods around each sample over k (N), and which references' hold a sample (R); metrics are means."""

    densities: Tensor
    covered: Tensor

    @property
    def density(self) -> float:
        """At least 0; about 1 if samples and references have the same distribution."""
        return self.densities.mean().item()

    @property
    def coverage(self) -> float:
        """Share of references, in [0, 1]."""
        return self.covered.double().mean().item()


def density_coverage(samples_ND: Tensor, references_RD: Tensor, k: int = 5) -> DensityCoverage:
    """Compute density and coverage (Naeem et al. 2020): like precision and recall, by references' neighbourhoods only.

    Raises:
        ValueError: there are fewer than k + 1 references, or features are NaN, infinite or of different dimensions.
    """
    _check_pair(samples_ND, references_RD, 1)
    _check(references_RD, k + 1, "references")
    samples, references = _centred(samples_ND, references_RD)
    radii = _radii(references, k)
    densities = torch.zeros(len(samples), dtype=torch.float64, device=samples.device)
    covered = torch.zeros(len(references), dtype=torch.bool, device=samples.device)
    for rows, columns, squares, tie in _pairs(samples, references):
        hits = squares < radii[columns] - tie
        densities[rows] += hits.sum(1) / k
        covered[columns] |= hits.any(0)
    return DensityCoverage(densities, covered)


def _radii(rows_ND: Tensor, k: int) -> Tensor:
    """Compute the squared distance of each row from its k-th nearest other row, (N)."""
    nearest = torch.full((len(rows_ND), k + 1), torch.inf, dtype=torch.float64, device=rows_ND.device)
    for rows, _, squares, _ in _pairs(rows_ND, rows_ND):
        nearest[rows] = torch.cat([nearest[rows], squares], dim=1).topk(k + 1, dim=1, largest=False).values
    return nearest.amax(1)  # the nearest of all is the row itself


def _pairs(x_ND: Tensor, y_ND: Tensor) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Yield blocks of pairs: rows of x, rows of y, their squared distances, and the tolerance for rounding."""
    lengths = y_ND.square().sum(1)
    for start in range(0, len(x_ND), BLOCK):
        rows = slice(start, start + BLOCK)
        own = x_ND[rows].square().sum(1, keepdim=True)
        for begin in range(0, len(y_ND), BLOCK):
            columns = slice(begin, begin + BLOCK)
            sums = own + lengths[columns]
            yield rows, columns, torch.addmm(sums, x_ND[rows], y_ND[columns].T, alpha=-2).clamp_(min=0), _TIE * sums


def _centred(samples_ND: Tensor, references_RD: Tensor) -> tuple[Tensor, Tensor]:
    """Centre both on the references' mean in float64: distances stay the same, with less cancellation."""
    centre = references_RD.double().mean(0)
    return samples_ND.double() - centre, references_RD.double() - centre


def _check(features: Tensor, fewest: int, what: str) -> None:
    if features.ndim != 2 or len(features) < fewest:
        raise ValueError(f"{what} have shape {tuple(features.shape)}: give rows, and at least {fewest}")
    if not torch.isfinite(features).all():
        raise ValueError(f"{what} hold NaN or infinite values: look at the images that they were taken from")


def _check_pair(samples_ND: Tensor, references_RD: Tensor, fewest: int) -> None:
    _check(samples_ND, fewest, "samples")
    _check(references_RD, fewest, "references")
    if samples_ND.shape[1] != references_RD.shape[1]:
        raise ValueError(
            f"samples of {samples_ND.shape[1]} and references of {references_RD.shape[1]} dimensions cannot be "
            "compared; take both from one extractor"
        )
