"""What an evaluation is given, and the instruments that it sets up on real images."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, runtime_checkable
from typing import Protocol as Interface

import numpy as np
import torch
from numpy.typing import ArrayLike
from pydantic import Field
from torch import Tensor

from flows.gallery import Pictures
from flows.recipes import EvaluateConfig
from flows.report_data import FinalAgreement, Measure, Protocol
from infra.config import Config
from sftok import metrics
from sftok.class_agreement import ClassReader, accuracy, thumbnails
from sftok.features import RandomFeatures
from sftok.frechet import frechet_distance

_BATCH = 64  # training images that are looked at at once
ROUNDING = "clamp to [0, 1], times 255, round half to even, uint8"


class Reconstructed(NamedTuple):
    """Held-out images through the tokenizer and back, in the order of the held-out images."""

    images: Tensor  # uint8 (n, 3, S, S)
    proxy_codes: ArrayLike  # (n, P), predicted
    teacher_codes: ArrayLike  # (n, P)


@runtime_checkable
class CodeBatches(Interface):
    """Codes (n, N) that are not in memory: read in batches, as often as asked."""

    def __len__(self) -> int: ...
    def batches(self) -> Iterator[ArrayLike]: ...  # noqa: D102


class ImageScorer(Interface):
    """Scores images under a protocol of Inception's features."""

    def reconstruction(
        self, images: Tensor, originals: Tensor, num_steps: int, facts: dict[str, Any]
    ) -> tuple[Measure, ...]:
        """Scores of reconstructions, held against their originals."""

    def generation(self, samples: Tensor, facts: dict[str, Any]) -> tuple[Measure, ...]:
        """Scores of samples, held against the protocol's reference."""


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

    Training images and codes may lie elsewhere and are passed over; what was held out and what was made is in memory.
    """

    class_names: tuple[str, ...]
    train_images: metrics.Images
    train_labels: Tensor
    val_images: Tensor
    val_labels: Tensor
    val_ids: list[str]
    reconstruct: Callable[[int], Reconstructed]  # from a number of decoding steps
    val_codes: ArrayLike
    train_codes: ArrayLike | CodeBatches  # all variants
    sample_codes: ArrayLike
    sample_classes: ArrayLike
    decode_samples: Callable[[], Tensor]
    facts: EvaluationFacts
    agreement: Callable[[], FinalAgreement] | None = None  # of what decoding predicts on the way
    lpips: Callable[[Tensor, Tensor], Tensor] | None = None  # of uint8 images and their originals, (n)
    scorer: ImageScorer | None = None  # None: random features alone
    reader_rows: Tensor | None = None  # indices of the training images that teach the class reader; None: all


@dataclass(frozen=True)
class Instruments:
    """What every figure needs: the inputs, the instruments set up on real images, and the pictures taken."""

    inputs: EvaluationInputs
    features: RandomFeatures
    train_moments: metrics.FeatureMoments
    val_moments: metrics.FeatureMoments
    reader: ClassReader | None
    random: np.random.Generator
    seeds: dict[str, int]
    nearest_images: int
    pictures: Pictures = field(default_factory=Pictures)

    @classmethod
    def of(cls, inputs: EvaluationInputs, config: EvaluateConfig, seed: int) -> "Instruments":
        """Set up on the real images of `inputs`."""
        features = RandomFeatures(config.feature_seed, inputs.val_images.shape[-1])
        train_moments, reader = _seen_in_training(inputs, features, config.class_reader)
        return cls(
            inputs=inputs,
            features=features,
            train_moments=train_moments,
            val_moments=metrics.FeatureMoments.of(features(inputs.val_images)),
            reader=reader,
            random=np.random.Generator(np.random.PCG64(seed)),
            seeds={"evaluate": seed, "features": config.feature_seed, **inputs.facts.seeds},
            nearest_images=config.nearest_images,
        )

    @property
    def _num_read(self) -> int:
        rows = self.inputs.reader_rows
        return len(self.inputs.train_images if rows is None else rows)

    def frechet(self, images: Tensor, reference: metrics.FeatureMoments) -> float:
        """Fréchet distance of images to a reference, between random features."""
        return frechet_distance(metrics.FeatureMoments.of(self.features(images)), reference)

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

    def read(self, name: str, label: str, images: Tensor, intended: Tensor, **facts: Any) -> Measure | None:
        """How often the class reader sees the intended class; nothing where there is no reader."""
        if self.reader is None:
            return None
        return Measure(
            name=name,
            label=label,
            value=accuracy(self.reader.read(images), intended),
            unit="%",
            better="higher",
            protocol=self.protocol(
                len(images),
                extractor=f"{self.reader.name}, trained on {self._num_read:,} real training images",
                definition="share of images read as the class that is meant",
                **{"reference": "classes of the images", **facts},
            ),
        )


def _seen_in_training(
    inputs: EvaluationInputs, features: RandomFeatures, is_read: bool
) -> tuple[metrics.FeatureMoments, ClassReader | None]:
    """What one pass over the training images gives: moments of their features, and a reader taught by thumbnails."""
    rows = inputs.reader_rows if inputs.reader_rows is not None else torch.arange(len(inputs.train_images))
    is_kept = torch.zeros(len(inputs.train_images), dtype=torch.bool)
    is_kept[rows if is_read else rows[:0]] = True
    total: metrics.FeatureMoments | None = None
    kept, at = [], 0
    for batch in inputs.train_images.split(_BATCH):
        moments = metrics.FeatureMoments.of(features(batch))
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
