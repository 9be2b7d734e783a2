"""The Fréchet distance at scale: streamed moments, one reference for many samples, and fewer samples than dimensions.

Legend: N samples, D feature dimensions, R <= D directions that vary.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from sftok.metrics.functional import FeatureMoments

_FULL_RANK = 1e-10  # smallest over largest eigenvalue of a product below which it counts as singular


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Mean (D) and unbiased covariance (D, D) in float64, and the number of samples if it is known."""

    mean: Tensor
    covariance: Tensor
    count: int | None = None

    @classmethod
    def of(cls, total: FeatureMoments) -> Self:
        """Make the Gaussian of merged moments."""
        return cls(total.mean, total.covariance, total.count)

    def to(self, device: torch.device | str) -> "Gaussian":
        """Copy to a device."""
        return Gaussian(self.mean.to(device), self.covariance.to(device), self.count)

    @cached_property
    def root(self) -> Tensor:
        """A (D, R) with A A' = covariance; computed once for all samples that are compared with it."""
        cholesky, failed = torch.linalg.cholesky_ex(self.covariance)
        if not failed and cholesky.diagonal().amin() ** 2 > _FULL_RANK * cholesky.diagonal().amax() ** 2:
            return cholesky
        variances, directions = torch.linalg.eigh(self.covariance)
        kept = variances > variances[-1] * len(variances) * torch.finfo(torch.float64).eps
        root: Tensor = directions[:, kept] * variances[kept].sqrt()
        return root


@dataclass(frozen=True, eq=False)
class FeatureRows:
    """Features of fewer samples than dimensions, (N, D), smaller than their covariance; merged by `+`, in order."""

    rows: Tensor

    def __post_init__(self) -> None:
        if self.rows.ndim != 2 or not torch.isfinite(self.rows).all():
            raise ValueError(
                f"features {tuple(self.rows.shape)} hold NaN or infinite values, or are no rows of samples"
            )

    def __add__(self, other: "FeatureRows") -> "FeatureRows":
        if self.rows.shape[1] != other.rows.shape[1]:
            raise ValueError(f"features of {self.rows.shape[1]} and {other.rows.shape[1]} dimensions cannot be merged")
        return FeatureRows(torch.cat([self.rows, other.rows]))

    def to(self, device: torch.device | str) -> "FeatureRows":
        """Copy to a device."""
        return FeatureRows(self.rows.to(device))

    @cached_property
    def mean(self) -> Tensor:
        """The mean, (D) float64."""
        return self.rows.double().mean(0)

    @cached_property
    def root(self) -> Tensor:
        """A (D, N) with A A' = the unbiased covariance, which is never formed: the scaled, centred features."""
        if len(self.rows) < 2:
            raise ValueError(f"a covariance needs at least 2 samples, there are {len(self.rows)}")
        return (self.rows.double() - self.mean).T / (len(self.rows) - 1) ** 0.5


def distance(samples: Gaussian | FeatureRows, reference: Gaussian | FeatureRows) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) in float64, exact for singular covariances; never negative.

    With S = A A', the trace of the root is the sum of the singular values of A_a' A_b; for full ranks it is the sum of
    the roots of the eigenvalues of S_a S_b, which is faster. With `FeatureRows` the product has N rows only. Computed
    on the device of both sides.
    """
    if samples.mean.shape != reference.mean.shape:
        raise ValueError(
            f"features of {len(samples.mean)} and of {len(reference.mean)} dimensions cannot be compared; "
            "take both from one extractor"
        )
    variance = _variance(samples) + _variance(reference)
    between = (samples.mean - reference.mean).square().sum()
    return max((between + variance - 2 * _shared(samples, reference)).item(), 0.0)


def frechet_distance(a: FeatureMoments, b: FeatureMoments) -> float:
    """Compute the distance between the Gaussians of two merged moments."""
    return distance(Gaussian.of(a), Gaussian.of(b))


def _variance(side: Gaussian | FeatureRows) -> Tensor:
    return side.covariance.trace() if isinstance(side, Gaussian) else side.root.square().sum()


def _shared(samples: Gaussian | FeatureRows, reference: Gaussian | FeatureRows) -> Tensor:
    """Compute tr((S_a S_b)^(1/2))."""
    if isinstance(samples, Gaussian) and isinstance(reference, Gaussian):
        eigenvalues = _eigenvalues(samples.covariance, reference.covariance)
        # For a singular product, roots of eigenvalues would keep half the digits only; singular values keep all.
        if eigenvalues is not None and eigenvalues[0] > _FULL_RANK * eigenvalues[-1]:
            return eigenvalues.sqrt().sum()
    return torch.linalg.svdvals(samples.root.T @ reference.root).sum()


def _eigenvalues(S_a: Tensor, S_b: Tensor) -> Tensor | None:
    """Compute the eigenvalues of S_a S_b, (D) ascending; None if S_b is singular.

    They are those of the symmetric L' S_a L with S_b = L L', which LAPACK forms at half the cost of two products.
    """
    if S_a.is_cuda:
        cholesky, failed = torch.linalg.cholesky_ex(S_b)
        return None if failed else torch.linalg.eigvalsh(cholesky.T @ S_a @ cholesky)
    try:
        values = scipy.linalg.eigh(
            S_a.cpu().numpy(), S_b.cpu().numpy(), type=2, eigvals_only=True, driver="gv", check_finite=False
        )
    except np.linalg.LinAlgError:
        return None
    return torch.from_numpy(values)


def summary(features_ND: Tensor) -> Gaussian | FeatureRows:
    """Summarise features in the form whose distance is fastest to compute."""
    if len(features_ND) < features_ND.shape[1]:
        return FeatureRows(features_ND)
    return Gaussian.of(FeatureMoments.of(features_ND))


def frechet(features_ND: Tensor, reference: Gaussian | FeatureRows) -> float:
    """Compute the distance of features from a reference.

    Raises:
        ValueError: fewer than 2 samples, NaN or infinite features, or other dimensions than the reference's.
    """
    return distance(summary(features_ND), reference)
