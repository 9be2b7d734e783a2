"""Metrics of images and codes: pure functions of tensors, with statistics separate from distances.

Legend: B images, C channels, H, W sides, N samples, D feature dimensions, T tokens per image, K codes.
Images are uint8, or floats in [0, 1], which `to_uint8` first rounds, so that a metric is that of the image that a file
would hold.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PSNR_CEILING = 100.0  # dB, for identical images, whose infinite ratio would make every mean infinite
SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
_MOMENT_ROWS = 4096  # of features converted to float64 at once: 64 MB of 2,048 dimensions
_BATCH = 64  # images converted to float64 at once


class Images(Protocol):
    """Images or other rows that are read batch by batch: a tensor, or a lazy reader."""

    @property
    def shape(self) -> torch.Size: ...  # noqa: D102
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Tensor: ...
    def split(self, size: int, /) -> Iterable[Tensor]: ...  # noqa: D102


def to_uint8(images_BCHW: Tensor) -> Tensor:
    """Convert images to uint8: floats in [0, 1] are clamped, then rounded half to even; uint8 passes unchanged.

    Deviates: the published evaluation rounds for rFID and truncates for gFID; this project has one rule.
    """
    if images_BCHW.dtype == torch.uint8:
        return images_BCHW
    if not images_BCHW.is_floating_point():
        raise ValueError(f"images are {images_BCHW.dtype}: give uint8, or floats in [0, 1]")
    if not torch.isfinite(images_BCHW).all():
        raise ValueError("images hold NaN or infinite values: look for a diverged model or a broken source")
    return (images_BCHW.clamp(0, 1) * 255).round().to(torch.uint8)


@dataclass(frozen=True, eq=False)
class FeatureMoments:
    """Count, sum (D) and sum of outer products (D, D) of feature vectors, in float64; merged by `+`, in any order."""

    count: int
    sum: Tensor
    outer: Tensor

    @classmethod
    def of(cls, features_ND: Tensor) -> Self:
        """Compute the moments of a batch or shard of features by blocks of rows, in order, on CUDA if they are there.

        Moments of shards, added in the order of the shards, equal those of one pass up to rounding (1e-12), and so do
        those of another device.

        Raises:
            ValueError: there are no features, or some are NaN or infinite.
        """
        if features_ND.ndim != 2 or not len(features_ND):
            raise ValueError(
                f"features have shape {tuple(features_ND.shape)}: give one row per sample, and at least one"
            )
        total, outer = (_sums_on_cuda if features_ND.is_cuda else _sums_on_cpu)(features_ND.detach())
        if not torch.isfinite(total).all():
            raise ValueError("features hold NaN or infinite values: look at the images they were taken from")
        return cls(len(features_ND), total, outer)

    def __add__(self, other: "FeatureMoments") -> "FeatureMoments":
        if self.sum.shape != other.sum.shape:
            raise ValueError(f"features of {len(self.sum)} and of {len(other.sum)} dimensions cannot be merged")
        return FeatureMoments(self.count + other.count, self.sum + other.sum, self.outer + other.outer)

    def to(self, device: torch.device | str) -> "FeatureMoments":
        """Copy to a device."""
        return FeatureMoments(self.count, self.sum.to(device), self.outer.to(device))

    @property
    def mean(self) -> Tensor:
        """The mean, (D)."""
        return self.sum / self.count

    @property
    def covariance(self) -> Tensor:
        """The unbiased covariance, (D, D)."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, there are {self.count}")
        return (self.outer - torch.outer(self.sum, self.sum) / self.count) / (self.count - 1)


def _sums_on_cpu(features_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the sum (D) and the sum of outer products (D, D)."""
    dims = features_ND.shape[1]
    total, outer = np.zeros(dims), np.zeros((dims, dims))
    for block in features_ND.split(_MOMENT_ROWS):
        rows = block.cpu().numpy().astype(np.float64)
        total += rows.sum(0)
        # NumPy recognises that both factors are one array, and computes half of the symmetric product.
        outer += rows.T @ rows
    return torch.from_numpy(total), torch.from_numpy(outer)


def _sums_on_cuda(features_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the same on the features' device, with 64 MB of 2,048 dimensions in float64 at once."""
    dims = features_ND.shape[1]
    total = features_ND.new_zeros(dims, dtype=torch.float64)
    outer = features_ND.new_zeros(dims, dims, dtype=torch.float64)
    for block in features_ND.split(_MOMENT_ROWS):
        rows = block.double()
        total += rows.sum(0)
        outer.addmm_(rows.T, rows)
    return total, outer


def psnr(images_BCHW: Tensor, references_BCHW: Tensor) -> Tensor:
    """Compute the peak signal-to-noise ratio per image, (B) in dB: 10 log10(255^2 / mean squared error over RGB).

    Deviates: the published evaluation uses the first channel only. Identical images give `PSNR_CEILING`.
    """
    a, b = _same_shape(images_BCHW, references_BCHW)
    errors_B = torch.cat([(x.double() - y.double()).square().flatten(1).mean(1) for x, y in _batches(a, b)])
    return (10 * torch.log10(255**2 / errors_B)).clamp(max=PSNR_CEILING)


def l1(images_BCHW: Tensor, references_BCHW: Tensor) -> Tensor:
    """Compute the mean absolute error per image over RGB, (B) in [0, 1]."""
    a, b = _same_shape(images_BCHW, references_BCHW)
    return torch.cat([(x.double() - y.double()).abs().flatten(1).mean(1) for x, y in _batches(a, b)]) / 255


def l2(images_BCHW: Tensor, references_BCHW: Tensor) -> Tensor:
    """Compute the mean squared error per image over RGB on the scale [0, 1], (B)."""
    a, b = _same_shape(images_BCHW, references_BCHW)
    return torch.cat([(x.double() - y.double()).square().flatten(1).mean(1) for x, y in _batches(a, b)]) / 255**2


def ssim(images_BCHW: Tensor, references_BCHW: Tensor) -> Tensor:
    """Compute the structural similarity per image, (B), at most 1 (Wang et al. 2004).

    Gaussian windows of 11x11 with sigma 1.5 inside the image only, K1 = 0.01, K2 = 0.03, range 1, biased covariances;
    the mean over window positions and RGB channels. This is scikit-image's definition with `gaussian_weights=True,
    use_sample_covariance=False`; torchmetrics has the same map inside a border of mirrored pixels.
    """
    a, b = _same_shape(images_BCHW, references_BCHW)
    if min(a.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(f"images of {a.shape[-2]}x{a.shape[-1]} are smaller than the {SSIM_WINDOW}-pixel SSIM window")
    return torch.cat([_ssim(x.double() / 255, y.double() / 255) for x, y in _batches(a, b)])


def _ssim(x_BCHW: Tensor, y_BCHW: Tensor) -> Tensor:
    offsets = torch.arange(SSIM_WINDOW, dtype=x_BCHW.dtype, device=x_BCHW.device) - SSIM_WINDOW // 2
    window = (-offsets.square() / (2 * SSIM_SIGMA**2)).exp()
    window = window / window.sum()
    channels = x_BCHW.shape[1]
    rows, columns = (window.view(1, 1, *shape).repeat(channels, 1, 1, 1) for shape in ((-1, 1), (1, -1)))

    def blur(maps: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(maps, rows, groups=channels), columns, groups=channels)

    mean_x, mean_y = blur(x_BCHW), blur(y_BCHW)
    var_x, var_y = blur(x_BCHW.square()) - mean_x.square(), blur(y_BCHW.square()) - mean_y.square()
    covariance = blur(x_BCHW * y_BCHW) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    structure = (2 * covariance + c2) / (var_x.clamp(min=0) + var_y.clamp(min=0) + c2)
    return (luminance * structure).flatten(1).mean(1)


def code_agreement(codes_BT: Tensor, references_BT: Tensor) -> Tensor:
    """Compute the share of positions per image where both have the same code, (B) in [0, 1]."""
    a, b = _same_shape(codes_BT, references_BT)
    return (a == b).double().mean(1)


def code_counts(codes_BT: Tensor, codebook_size: int) -> Tensor:
    """Count the occurrences of each code, (K) int64; counts of batches add up."""
    flat = codes_BT.reshape(-1).long()
    if not len(flat):
        raise ValueError("there are no codes to count")
    if flat.min() < 0 or flat.max() >= codebook_size:
        raise ValueError(f"codes from {int(flat.min())} to {int(flat.max())} do not fit a codebook of {codebook_size}")
    return torch.bincount(flat, minlength=codebook_size)


def codebook_usage(counts_K: Tensor) -> float:
    """Compute the share of codes that occur at least once, in [0, 1], from `code_counts`."""
    return (counts_K > 0).double().mean().item()


def entropy_bits(counts_K: Tensor) -> float:
    """Compute the entropy of the code frequencies in bits, at most log2(K), from `code_counts`."""
    counts = counts_K.double()
    shares = counts[counts > 0] / counts.sum()
    return max(-(shares * shares.log2()).sum().item(), 0.0)


def perplexity(counts_K: Tensor) -> float:
    """Compute 2 to the power of the entropy, the number of equally frequent codes with that entropy, in [1, K]."""
    return float(2.0 ** entropy_bits(counts_K))


def verbatim_shares(codes: Sequence[Tensor], training_codes: Iterable[Tensor]) -> list[float]:
    """Compute the share of rows (B, T) of each set that occur whole among the training rows, in [0, 1].

    The sets are in memory; the training rows are read once, batch by batch.
    """
    looked_for = [_row_bytes(rows_BT) for rows_BT in codes]
    wanted, found = set().union(*looked_for), set[bytes]()
    for batch in training_codes:
        for rows_BT in codes:
            if rows_BT.shape[1:] != batch.shape[1:] or not len(rows_BT):
                raise ValueError(f"cannot look for codes {tuple(rows_BT.shape)} among {tuple(batch.shape)}")
        found |= wanted.intersection(_row_bytes(batch))
    return [sum(row in found for row in rows) / len(rows) for rows in looked_for]


def _row_bytes(codes_BT: Tensor) -> list[bytes]:
    """Convert each row to bytes that are equal if the rows are."""
    data, width = codes_BT.to("cpu", torch.int32).contiguous().numpy().tobytes(), 4 * codes_BT.shape[1]
    return [data[at : at + width] for at in range(0, len(data), width)]


def distinct_share(codes_BT: Tensor) -> float:
    """Compute the share of distinct rows of codes, in (0, 1]; 1 means that no two are equal."""
    return len(torch.unique(codes_BT.long(), dim=0)) / len(codes_BT)


def _same_shape(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.shape != b.shape or not len(a):
        raise ValueError(f"cannot compare {tuple(a.shape)} with {tuple(b.shape)}: the shapes must be equal, not empty")
    return (to_uint8(a), to_uint8(b)) if a.ndim == 4 else (a, b)


def _batches(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(torch.split(a, _BATCH), torch.split(b, _BATCH), strict=True)
