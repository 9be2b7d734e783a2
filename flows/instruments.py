"""What an evaluation is given, and the instruments that it sets up on real images."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from pydantic import Field
from torch import Tensor

from flows.gallery import Pictures
from flows.recipes import EvaluateConfig
from flows.report_data import Measure, Protocol
from infra.config import Config
from sftok import metrics
from sftok.class_agreement import ClassReader, accuracy
from sftok.features import RandomFeatures

ROUNDING = "clamp to [0, 1], times 255, round half to even, uint8"


class Reconstructed(NamedTuple):
    """Held-out images through the tokenizer and back, in the order of the held-out images."""

    images: Tensor  # uint8 (n, 3, S, S)
    proxy_codes: ArrayLike  # (n, P), predicted
    teacher_codes: ArrayLike  # (n, P)


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
    """Everything that is measured: images uint8 (n, 3, S, S), class ids (-1 = none), codes (n, N)."""

    class_names: tuple[str, ...]
    train_images: Tensor
    train_labels: Tensor
    val_images: Tensor
    val_labels: Tensor
    val_ids: list[str]
    reconstruct: Callable[[int], Reconstructed]  # from a number of decoding steps
    val_codes: ArrayLike
    train_codes: ArrayLike  # all variants
    sample_codes: ArrayLike
    sample_classes: ArrayLike
    decode_samples: Callable[[], Tensor]
    facts: EvaluationFacts


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
    pictures: Pictures = field(default_factory=Pictures)

    @classmethod
    def of(cls, inputs: EvaluationInputs, config: EvaluateConfig, seed: int) -> "Instruments":
        """Set up on the real images of `inputs`."""
        features = RandomFeatures(config.feature_seed, inputs.val_images.shape[-1])
        return cls(
            inputs=inputs,
            features=features,
            train_moments=metrics.FeatureMoments.of(features(inputs.train_images)),
            val_moments=metrics.FeatureMoments.of(features(inputs.val_images)),
            reader=ClassReader.fit(inputs.train_images, inputs.train_labels) if config.class_reader else None,
            random=np.random.Generator(np.random.PCG64(seed)),
            seeds={"evaluate": seed, "features": config.feature_seed, **inputs.facts.seeds},
        )

    def frechet(self, images: Tensor, reference: metrics.FeatureMoments) -> float:
        """Fréchet distance of images to a reference, between random features."""
        return metrics.frechet_distance(metrics.FeatureMoments.of(self.features(images)), reference)

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
                extractor=f"{self.reader.name}, trained on {len(self.inputs.train_images):,} real training images",
                definition="share of images read as the class that is meant",
                **{"reference": "classes of the images", **facts},
            ),
        )


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
