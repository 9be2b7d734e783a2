"""Compute the scores of a protocol from features: values, intervals, and distances extrapolated to infinite N."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Self, TypeVar

import torch
from pydantic import Field, FiniteFloat
from torch import Tensor

from infra.config import Config
from sftok.metrics.frechet import FeatureRows, Gaussian, frechet, summary
from sftok.metrics.protocols import BETTER, ScoreName, ScoreProtocol
from sftok.metrics.resampling import Interval, extrapolate, interval, spread
from sftok.metrics.scores import (
    density_coverage,
    equal_splits,
    inception_score,
    kernel_distance,
    precision_recall,
    splits_of,
)

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Features:
    """Features of images, one row per image; merged by `+`, in order."""

    pool: Tensor
    spatial: Tensor | None = None
    logits: Tensor | None = None

    def __post_init__(self) -> None:
        if any(len(part) != len(self.pool) for part in (self.spatial, self.logits) if part is not None):
            raise ValueError(f"pool features are of {len(self.pool)} images, spatial ones or logits of another number")

    def __len__(self) -> int:
        return len(self.pool)

    def __add__(self, other: "Features") -> "Features":
        return Features(
            torch.cat([self.pool, other.pool]), _joined(self.spatial, other.spatial), _joined(self.logits, other.logits)
        )

    def rows(self, chosen: Tensor) -> "Features":
        """Select features of images by index, in that order."""
        parts = (self.spatial, self.logits)
        return Features(self.pool[chosen], *(None if part is None else part[chosen] for part in parts))

    def to(self, device: torch.device | str) -> "Features":
        """Copy to a device."""
        parts = (self.spatial, self.logits)
        return Features(self.pool.to(device), *(None if part is None else part.to(device) for part in parts))

    def first(self, count: int) -> "Features":
        """Select features of the first images."""
        parts = (None if part is None else part[:count] for part in (self.pool, self.spatial, self.logits))
        pool, spatial, logits = parts
        assert pool is not None
        return Features(pool, spatial, logits)


def _joined(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if (a is None) != (b is None):
        raise ValueError("features of which only some hold spatial ones or logits cannot be merged")
    return None if a is None or b is None else torch.cat([a, b])


@dataclass(frozen=True, eq=False)
class Reference:
    """Reference of the samples: statistics, and features if scores need individual ones."""

    description: str
    pool: Gaussian | FeatureRows
    spatial: Gaussian | FeatureRows | None = None
    features: Tensor | None = None
    num_images: int | None = None
    extractor_sha256: str = ""
    resize: str = ""

    @classmethod
    def of(cls, features: Features, protocol: ScoreProtocol, description: str) -> Self:
        """Make the reference of features that were extracted as the protocol says."""
        spatial = None if features.spatial is None else summary(features.spatial)
        origin = {"extractor_sha256": protocol.extractor_sha256, "resize": protocol.resize}
        return cls(description, summary(features.pool), spatial, features.pool, len(features), **origin)

    def to(self, device: torch.device | str) -> Self:
        """Copy to a device."""
        spatial = None if self.spatial is None else self.spatial.to(device)
        features = None if self.features is None else self.features.to(device)
        return replace(self, pool=self.pool.to(device), spatial=spatial, features=features)


class ScoreAtInfinity(Config):
    """A distance extrapolated to infinitely many samples."""

    value: FiniteFloat
    method: str


class ImageScore(Config):
    """A score with its interval and everything that it depends on."""

    name: ScoreName
    label: str
    value: FiniteFloat
    better: Literal["higher", "lower"]
    interval: tuple[FiniteFloat, FiniteFloat]
    interval_method: str = Field(description="method, replicates and size of the subsamples, seed")
    at_infinity: ScoreAtInfinity | None = Field(
        None, description="for Fréchet distances, whose bias is proportional to 1/N"
    )
    definition: str
    num_images: int
    reference: str
    num_reference: int | None = Field(description="images of the reference; null: not stated in its file")
    protocol: ScoreProtocol


def measure(
    protocol: ScoreProtocol, samples: Features, reference: Reference, *, device: torch.device | str = "cpu"
) -> tuple[ImageScore, ...]:
    """Compute all scores of a protocol.

    For 50,000 samples a GPU holds 1 GB of features, and as much again in float64 during the search for neighbours; of a
    reference it holds the covariances and the stored features, 82 MB for 10,000 images, never those of all images.

    Args:
        protocol: the scores and their parameters.
        samples: features of the images, extracted as the protocol says, in the order of the images.
        reference: to compare with.
        device: of the computation, in float64: a CPU or a GPU.

    Raises:
        ValueError: there are fewer samples than N; the reference has another extractor or resize, or too few images;
            features that a score needs are missing, NaN or infinite.
    """
    _check(protocol, samples, reference)
    chosen = samples.first(protocol.num_images)
    return tuple(_scores(protocol, chosen.to(device), reference.to(device)))


def _scores(protocol: ScoreProtocol, samples: Features, reference: Reference) -> Iterator[ImageScore]:
    found: dict[str, tuple[float, Interval]] = {}
    for score in protocol.scores:
        if score not in found:
            found |= _FIND[score](protocol, samples, reference)
        value, between = found[score]
        yield ImageScore(
            name=score,
            label=protocol.label(score),
            value=value,
            better=BETTER[score],
            interval=between[:2],
            interval_method=between.method,
            at_infinity=_at_infinity(protocol, score, samples, reference),
            definition=protocol.definition(score),
            num_images=len(samples),
            reference=reference.description,
            num_reference=reference.num_images,
            protocol=protocol,
        )


ScoreValues = dict[str, tuple[float, Interval]]


def _frechet_sides(
    score: ScoreName, samples: Features, reference: Reference
) -> tuple[Tensor, Gaussian | FeatureRows] | None:
    if score == "fid":
        return samples.pool, reference.pool
    if score == "sfid":
        rows = _given(samples.spatial, "the samples have no spatial features")
        statistics: Gaussian | FeatureRows | None = reference.spatial
        if statistics is None:
            raise ValueError(f"{reference.description} has no spatial statistics (mu_s, sigma_s), which sFID needs")
        return rows, statistics
    return None


def _find_frechet(score: ScoreName, protocol: ScoreProtocol, samples: Features, reference: Reference) -> ScoreValues:
    sides = _frechet_sides(score, samples, reference)
    assert sides is not None
    rows, statistics = sides
    value = frechet(rows, statistics)
    return {score: (value, _interval(protocol, value, lambda chosen: frechet(rows[chosen], statistics), len(rows)))}


def _at_infinity(
    protocol: ScoreProtocol, score: ScoreName, samples: Features, reference: Reference
) -> ScoreAtInfinity | None:
    sides = _frechet_sides(score, samples, reference)
    if sides is None:
        return None
    found = extrapolate(*sides, seed=protocol.seed, points=protocol.points)
    return ScoreAtInfinity(value=found.value, method=found.method)


def _find_inception_score(protocol: ScoreProtocol, samples: Features, _: Reference) -> ScoreValues:
    logits = _given(samples.logits, "the samples have no logits")

    def of(rows: Tensor) -> float:
        if protocol.score_splits:
            splits = equal_splits(len(rows), protocol.score_splits, protocol.score_seed)
        else:
            splits = splits_of(len(rows), protocol.score_split_size)
        return inception_score(logits[rows], splits).value

    value = of(torch.arange(len(logits)))
    return {"inception_score": (value, _interval(protocol, value, of, len(logits)))}


def _find_kid(protocol: ScoreProtocol, samples: Features, reference: Reference) -> ScoreValues:
    references = _given(reference.features, f"{reference.description} has statistics only, KID needs its features")
    estimate = partial(kernel_distance, samples.pool, references, reference_first=protocol.kid_reference_first)
    value = estimate(subsets=protocol.kid_subsets, subset_size=protocol.kid_subset_size, seed=protocol.kid_seed).value
    fewest = min(len(samples), len(references))
    size = min(protocol.kid_subset_size, fewest // 2)
    halves = estimate(subsets=protocol.replicates, subset_size=size, seed=protocol.seed)
    what = f"{protocol.replicates} subsets of either side,"
    return {"kid": (value, spread(value, halves.deviation, what, size, fewest, protocol.seed))}


def _find_precision_recall(protocol: ScoreProtocol, samples: Features, reference: Reference) -> ScoreValues:
    references = _given(reference.features, f"{reference.description} has statistics only, recall needs its features")
    found = precision_recall(samples.pool, references, protocol.neighbours)
    return {
        "precision": _mean(protocol, found.near_reference),
        "recall": _mean(protocol, found.near_sample),
    }


def _find_density_coverage(protocol: ScoreProtocol, samples: Features, reference: Reference) -> ScoreValues:
    references = _given(reference.features, f"{reference.description} has statistics only, coverage needs its features")
    found = density_coverage(samples.pool, references, protocol.density_neighbours)
    return {"density": _mean(protocol, found.densities), "coverage": _mean(protocol, found.covered)}


def _mean(protocol: ScoreProtocol, rows: Tensor) -> tuple[float, Interval]:
    """Average rows; subsamples need no new distances, since neighbourhoods are those among all rows."""
    values = rows.double()
    value = values.mean().item()
    return value, _interval(protocol, value, lambda chosen: values[chosen].mean().item(), len(values))


def _interval(protocol: ScoreProtocol, value: float, of: Callable[[Tensor], float], count: int) -> Interval:
    return interval(value, of, count, replicates=protocol.replicates, seed=protocol.seed)


_FIND: dict[ScoreName, Callable[[ScoreProtocol, Features, Reference], ScoreValues]] = {
    "fid": partial(_find_frechet, "fid"),
    "sfid": partial(_find_frechet, "sfid"),
    "inception_score": _find_inception_score,
    "kid": _find_kid,
    "precision": _find_precision_recall,
    "recall": _find_precision_recall,
    "density": _find_density_coverage,
    "coverage": _find_density_coverage,
}


def _given(part: T | None, otherwise: str) -> T:
    if part is None:
        raise ValueError(f"{otherwise}; take them with the protocol's extractor, or leave the score out")
    return part


def _check(protocol: ScoreProtocol, samples: Features, reference: Reference) -> None:
    """Check samples and reference against the protocol."""
    if len(samples) < protocol.num_images:
        raise ValueError(
            f"{protocol.name} takes {protocol.num_images} images, there are {len(samples)}: make more, or name the "
            f"protocol of that number, ScoreProtocol.at({len(samples)})"
        )
    if protocol.num_reference and (reference.num_images or 0) < protocol.num_reference:
        raise ValueError(
            f"{protocol.name} takes {protocol.num_reference} reference images at least, {reference.description} has "
            f"{reference.num_images or 'an unknown number'}"
        )
    for what, theirs, ours in (
        ("extractor's sha256", reference.extractor_sha256, protocol.extractor_sha256),
        ("resize", reference.resize, protocol.resize),
    ):
        if theirs and theirs != ours:
            raise ValueError(
                f"{reference.description}: its {what} is {theirs}, {protocol.name} has {ours}; take a reference of "
                "this protocol"
            )
    if not torch.isfinite(samples.pool).all():
        raise ValueError("features hold NaN or infinite values: look at the images that they were taken from")
