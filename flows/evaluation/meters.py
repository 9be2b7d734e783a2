"""What an evaluation is given, and the instruments that it sets up on real images."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, runtime_checkable
from typing import Protocol as Interface

import numpy as np
import torch
from numpy.typing import ArrayLike
from pydantic import Field
from torch import Tensor

from flows.evaluation.gallery import Pictures
from flows.recipes.small import EvaluateConfig
from flows.results.types import FinalAgreement, Measure, Protocol
from infra.config import Config
from sftok.metrics import functional
from sftok.metrics.class_reader import ClassReader, accuracy, thumbnails
from sftok.metrics.frechet import frechet_distance
from sftok.metrics.measure import Features
from sftok.metrics.nearest import Nearest, NearestSearch
from sftok.metrics.random_features import RandomFeatures

_BATCH = 64  # real images that are looked at at once
ROUNDING = "clamp to [0, 1], times 255, round half to even, uint8"


class Reconstructed(NamedTuple):
    """Some held-out images through the tokenizer and back, on any device."""

    images: Tensor  # uint8 (n, 3, S, S)
    proxy_codes: Tensor  # (n, P), predicted
    teacher_codes: Tensor  # (n, P)


@runtime_checkable
class CodeBatches(Interface):
    """Codes (n, N) that are not in memory: read in batches, as often as asked."""

    def __len__(self) -> int: ...
    def batches(self) -> Iterator[ArrayLike]: ...  # noqa: D102


class FeatureMeter(Interface):
    """Takes a scorer's features of images that pass."""

    def add(self, images: Tensor) -> None:
        """See the next uint8 images (n, 3, S, S), on any device."""

    def features(self) -> Features:
        """Those of all images so far, as whoever made this orders them."""


class ImageScorer(Interface):
    """Scores images under a protocol of Inception's features."""

    def meter(self, num_steps: int | None = None) -> FeatureMeter:
        """What sees the held-out images' reconstructions in so many steps, in order; without a number, the samples."""

    def reconstruction(
        self, seen: FeatureMeter, originals: Tensor, num_steps: int, facts: dict[str, Any]
    ) -> tuple[Measure, ...]:
        """Scores of reconstructions, held against their originals."""

    def generation(self, seen: FeatureMeter, facts: dict[str, Any]) -> tuple[Measure, ...]:
        """Scores of samples, held against the protocol's reference."""


class Reconstruct(Interface):
    """Reconstructs held-out images."""

    def __call__(self, num_steps: int, rows: Sequence[int] | None = None) -> Iterable[Reconstructed]:
        """Those numbered `rows`, by default all, in that order, some at a time."""


class EvaluationFacts(Config):
    """What the figures' protocols state about the models."""

    codebook_size: int
    num_steps: int
    temperature: float = 0.0
    sample_temperature: float = 1.0
    cfg_scale: float = 1.0
    resize: str = ""
    seeds: dict[str, int] = Field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationInputs:
    """Everything that is measured: images uint8 (n, 3, S, S), class ids (-1 = none), codes (n, N).

    Training images and codes may lie elsewhere and are passed over; what was held out is in memory; what was made is
    decoded some images at a time, once for all that looks at it.
    """

    class_names: tuple[str, ...]
    train_images: functional.Images
    train_labels: Tensor
    val_images: Tensor
    val_labels: Tensor
    val_ids: list[str]
    reconstruct: Reconstruct
    val_codes: ArrayLike
    train_codes: ArrayLike | CodeBatches  # all variants
    sample_codes: ArrayLike
    sample_classes: ArrayLike
    decode_samples: Callable[[], Iterable[Tensor]]  # all of them, some at a time
    facts: EvaluationFacts
    agreement: Callable[[], FinalAgreement] | None = None  # of what decoding predicts on the way
    lpips: Callable[[Tensor, Tensor], Tensor] | None = None  # of uint8 images and their originals, (n)
    scorer: ImageScorer | None = None  # None: random features alone
    reader_rows: Tensor | None = None  # indices of the training images that teach the class reader; None: all
    device: str = "cpu"  # where figures are computed


@dataclass(frozen=True)
class Instruments:
    """What every figure needs: the inputs, the instruments set up on real images, and the pictures taken."""

    inputs: EvaluationInputs
    features: RandomFeatures
    train_moments: functional.FeatureMoments
    val_moments: functional.FeatureMoments
    reader: ClassReader | None
    random: np.random.Generator
    seeds: dict[str, int]
    nearest: list[Nearest]
    """the nearest training images of each set of queries."""
    pictures: Pictures = field(default_factory=Pictures)

    @classmethod
    def of(
        cls,
        inputs: EvaluationInputs,
        config: EvaluateConfig,
        seed: int,
        *,
        features: RandomFeatures,
        queries: Sequence[Tensor],
    ) -> "Instruments":
        """Set up on the real images of `inputs`, and look for the nearest training images of `queries` on the way."""
        search = NearestSearch(queries, inputs.device)
        train_moments, reader = _seen_in_training(inputs, features, search, is_read=config.class_reader)
        val_features = [features(part.to(inputs.device)) for part in inputs.val_images.split(_BATCH)]
        return cls(
            inputs=inputs,
            features=features,
            train_moments=train_moments,
            val_moments=functional.FeatureMoments.of(torch.cat(val_features)),
            reader=reader,
            random=np.random.Generator(np.random.PCG64(seed)),
            seeds={"evaluate": seed, "features": config.feature_seed, **inputs.facts.seeds},
            nearest=search.found(),
        )

    @property
    def _num_read(self) -> int:
        rows = self.inputs.reader_rows
        return len(self.inputs.train_images if rows is None else rows)

    def frechet(self, features_ND: Tensor, reference: functional.FeatureMoments) -> float:
        """Fréchet distance to a reference of images whose random features these are."""
        return frechet_distance(functional.FeatureMoments.of(features_ND.to(self.inputs.device)), reference)

    def protocol(self, num_images: int, **facts: Any) -> Protocol:
        """The protocol of a figure on images or codes that involve the tokenizer only."""
        common = {"resize": self.inputs.facts.resize, "rounding": ROUNDING, "dtype": "float64", "seeds": self.seeds}
        return Protocol.model_validate({"num_images": num_images, **common, **facts})

    def feature_protocol(self, num_images: int, reference: str, num_reference: int, **facts: Any) -> Protocol:
        """The protocol of a distance between random features."""
        return self.protocol(
            num_images,
            reference=reference,
            num_reference=num_reference,
            extractor=f"{self.features.name}, {self.features.dimensions} dimensions",
            extractor_sha256=self.features.sha256,
            dtype="float32 features, float64 moments and distance",
            definition="Fréchet distance of Gaussians fitted to random features; not FID, other scale",
            **facts,
        )

    def sampling(self) -> dict[str, Any]:
        """What a protocol says of generated images, beyond what it says of reconstructions."""
        facts = self.inputs.facts
        return {
            "num_steps": facts.num_steps,
            "temperature": facts.temperature,
            "sample_temperature": facts.sample_temperature,
            "cfg_scale": facts.cfg_scale,
        }

    def read(self, name: str, label: str, seen: Tensor | None, intended: Tensor, **facts: Any) -> Measure | None:
        """How often the class reader has seen the intended class; nothing where there is no reader."""
        if self.reader is None or seen is None:
            return None
        return Measure(
            name=name,
            label=label,
            value=accuracy(seen, intended),
            unit="%",
            better="higher",
            protocol=self.protocol(
                len(seen),
                extractor=f"{self.reader.name}, trained on {self._num_read:,} real training images",
                definition="share of images read as the class that is meant",
                **{"reference": "classes of the images", **facts},
            ),
        )


def _seen_in_training(
    inputs: EvaluationInputs, features: RandomFeatures, search: NearestSearch, *, is_read: bool
) -> tuple[functional.FeatureMoments, ClassReader | None]:
    """What one pass over the training images gives: moments of their features, and a reader taught by thumbnails."""
    rows = inputs.reader_rows if inputs.reader_rows is not None else torch.arange(len(inputs.train_images))
    is_kept = torch.zeros(len(inputs.train_images), dtype=torch.bool)
    is_kept[rows if is_read else rows[:0]] = True
    total: functional.FeatureMoments | None = None
    kept, at = [], 0
    for batch in inputs.train_images.split(_BATCH):
        there = batch.to(inputs.device)
        search.add(there)
        moments = functional.FeatureMoments.of(features(there))
        total = moments if total is None else total + moments
        if (here := is_kept[at : at + len(batch)]).any():
            kept.append(thumbnails(batch[here]))
        at += len(batch)
    assert total is not None, "`check` refuses an empty training set"
    if not is_read:
        return total, None
    order = torch.argsort(torch.argsort(rows)).numpy()  # they came by index, and are taught in the order of the rows
    return total, ClassReader.fit_thumbnails(np.concatenate(kept)[order], inputs.train_labels[rows])


def code_batches(values: ArrayLike | CodeBatches) -> Iterator[Tensor]:
    """Codes as int64 (n, N), in batches where they are not in memory."""
    if isinstance(values, CodeBatches):
        yield from map(as_codes, values.batches())
    else:
        yield as_codes(values)


def rows_of(values: ArrayLike | CodeBatches) -> int:
    """How many rows of codes there are."""
    return len(values) if isinstance(values, CodeBatches) else len(np.asarray(values))


def as_codes(values: ArrayLike) -> Tensor:
    """Codes or class ids of any integer type (uint16 included) as int64."""
    return torch.from_numpy(np.asarray(values).astype(np.int64))


def check(inputs: EvaluationInputs) -> None:
    """Refuse inputs that do not belong together, before anything is computed."""
    counts: dict[str, dict[str, Any]] = {
        "train": {"images": inputs.train_images, "labels": inputs.train_labels},
        "val": {
            "images": inputs.val_images,
            "labels": inputs.val_labels,
            "ids": inputs.val_ids,
            "codes": inputs.val_codes,
        },
        "sample": {"codes": inputs.sample_codes, "classes": inputs.sample_classes},
    }
    for split, parts in counts.items():
        lengths = {what: len(values) for what, values in parts.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"{split}: {lengths} must be one for one; look for shards that are missing")
        if min(lengths.values()) < 2:
            raise ValueError(f"{split}: {lengths} are too few to evaluate: at least 2, some hundreds to mean anything")
