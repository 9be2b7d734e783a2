"""Inputs of an evaluation, and the meters that are set up on its real images and shared by all scores."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, runtime_checkable
from typing import Protocol as Interface

import numpy as np
import torch
from numpy.typing import ArrayLike
from pydantic import Field
from torch import Tensor

from infra.config import Config
from sftok.evaluation.results import Protocol, Score
from sftok.metrics import functional
from sftok.metrics.class_reader import ClassReader, accuracy, thumbnails
from sftok.metrics.frechet import frechet_distance
from sftok.metrics.measure import Features
from sftok.metrics.nearest import NearestResult, NearestSearch
from sftok.metrics.random_features import RandomFeatures
from sftok.metrics.step_agreement import StepAgreement

_BATCH = 64  # real images per batch
FD_RANDOM = "Fréchet distance of Gaussians fitted to random features; not FID, other scale"
ROUNDING = "clamp to [0, 1], times 255, round half to even, uint8"


class ReconstructionBatch(NamedTuple):
    """A batch of reconstructed held-out images, on any device."""

    images: Tensor  # uint8 (n, 3, S, S)
    proxy_codes: Tensor  # (n, P), predicted
    teacher_codes: Tensor  # (n, P)


@runtime_checkable
class CodeBatches(Interface):
    """Codes (n, N) that are not in memory: read in batches, any number of times."""

    def __len__(self) -> int: ...
    def batches(self) -> Iterator[ArrayLike]: ...  # noqa: D102


class FeatureMeter(Interface):
    """Accumulator of a scorer's features over a stream of images."""

    def add(self, images: Tensor) -> None:
        """Add the next uint8 images (n, 3, S, S), on any device."""

    def features(self) -> Features:
        """Return the features of all images so far, in the order that its maker defines."""


class ImageScorer(Interface):
    """Scorer of images under a protocol of Inception features."""

    def meter(self, num_steps: int | None = None) -> FeatureMeter:
        """Return a meter for the held-out images' reconstructions in `num_steps`, in order; for the samples if None."""

    def reconstruction(
        self, meter: FeatureMeter, originals: Tensor, num_steps: int, facts: dict[str, Any]
    ) -> tuple[Score, ...]:
        """Score reconstructions against their originals."""

    def generation(self, meter: FeatureMeter, facts: dict[str, Any]) -> tuple[Score, ...]:
        """Score samples against the protocol's reference."""


class Reconstruct(Interface):
    """Function that reconstructs held-out images."""

    def __call__(self, num_steps: int, rows: Sequence[int] | None = None) -> Iterable[ReconstructionBatch]:
        """Yield reconstructions of the images at the indices `rows` (default: all), in that order, in batches."""


class ProtocolFacts(Config):
    """Facts about the models that the scores' protocols state."""

    codebook_size: int
    num_steps: int
    temperature: float = 0.0
    sample_temperature: float = 1.0
    cfg_scale: float = 1.0
    resize: str = ""
    seeds: dict[str, int] = Field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationInputs:
    """Everything that is evaluated: images uint8 (n, 3, S, S), class ids (-1 = none), codes (n, N).

    Training images and codes may be streamed from storage; held-out images are in memory; reconstructions and samples
    are decoded in batches, once for all scores.
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
    decode_samples: Callable[[], Iterable[Tensor]]  # all of them, in batches
    facts: ProtocolFacts
    agreement: Callable[[], StepAgreement] | None = None  # of each decoding step with the last
    lpips: Callable[[Tensor, Tensor], Tensor] | None = None  # of uint8 images and their originals, (n)
    scorer: ImageScorer | None = None  # None: random features only
    reader_rows: Tensor | None = None  # training images that train the class reader, by index; None: all
    device: str = "cpu"  # where scores are computed


@dataclass(frozen=True)
class Meters:
    """State shared by all scores: the inputs, and what was set up on the real images."""

    inputs: EvaluationInputs
    features: RandomFeatures
    train_moments: functional.FeatureMoments
    val_moments: functional.FeatureMoments
    mean_image: Tensor
    """mean of the training images, uint8 (3, S, S)."""
    reader: ClassReader | None
    random: np.random.Generator
    seeds: dict[str, int]
    nearest: list[NearestResult]
    """nearest training images of each set of queries."""

    @classmethod
    def of(
        cls,
        inputs: EvaluationInputs,
        *,
        seed: int,
        features: RandomFeatures,
        queries: Sequence[Tensor],
        is_read: bool,
    ) -> "Meters":
        """Set up on the real images of `inputs`, and find the nearest training images of `queries` in the same pass."""
        search = NearestSearch(queries, inputs.device)
        train_moments, mean_image, reader = _pass_training_images(inputs, features, search, is_read=is_read)
        val_features = [features(part.to(inputs.device)) for part in inputs.val_images.split(_BATCH)]
        return cls(
            inputs=inputs,
            features=features,
            train_moments=train_moments,
            val_moments=functional.FeatureMoments.of(torch.cat(val_features)),
            mean_image=mean_image,
            reader=reader,
            random=np.random.Generator(np.random.PCG64(seed)),
            seeds={"evaluate": seed, "features": features.seed, **inputs.facts.seeds},
            nearest=search.found(),
        )

    @property
    def _num_read(self) -> int:
        rows = self.inputs.reader_rows
        return len(self.inputs.train_images if rows is None else rows)

    def frechet(self, features_ND: Tensor, reference: functional.FeatureMoments) -> float:
        """Return the Fréchet distance of images with these random features to a reference."""
        return frechet_distance(functional.FeatureMoments.of(features_ND.to(self.inputs.device)), reference)

    def protocol(self, num_images: int, **facts: Any) -> Protocol:
        """Return the protocol of a score on images or codes that involve the tokenizer only.

        Scores of two runs are comparable if these texts are equal: rewording one makes earlier runs incomparable.
        """
        common = {"resize": self.inputs.facts.resize, "rounding": ROUNDING, "dtype": "float64", "seeds": self.seeds}
        return Protocol.model_validate({"num_images": num_images, **common, **facts})

    def feature_protocol(self, num_images: int, reference: str, num_reference: int, **facts: Any) -> Protocol:
        """Return the protocol of a distance between random features."""
        return self.protocol(
            num_images,
            reference=reference,
            num_reference=num_reference,
            extractor=self.features.description,
            extractor_sha256=self.features.sha256,
            dtype="float32 features, float64 moments and distance",
            definition=FD_RANDOM,
            **facts,
        )

    def sampling(self) -> dict[str, Any]:
        """Return the protocol facts of generated images, beyond those of reconstructions."""
        facts = self.inputs.facts
        return {
            "num_steps": facts.num_steps,
            "temperature": facts.temperature,
            "sample_temperature": facts.sample_temperature,
            "cfg_scale": facts.cfg_scale,
        }

    def class_agreement(
        self, name: str, label: str, predicted: Tensor | None, intended: Tensor, **facts: Any
    ) -> Score | None:
        """Score how often the class reader predicts the intended class; None without a reader."""
        if self.reader is None or predicted is None:
            return None
        return Score(
            name=name,
            label=label,
            value=accuracy(predicted, intended),
            unit="%",
            better="higher",
            protocol=self.protocol(
                len(predicted),
                extractor=f"{self.reader.name}, trained on {self._num_read:,} real training images",
                definition="share of images read as the class that is meant",
                **{"reference": "classes of the images", **facts},
            ),
        )


def _pass_training_images(
    inputs: EvaluationInputs, features: RandomFeatures, search: NearestSearch, *, is_read: bool
) -> tuple[functional.FeatureMoments, Tensor, ClassReader | None]:
    """Pass once over the training images: moments of their features, their mean, and a class reader of thumbnails."""
    rows = inputs.reader_rows if inputs.reader_rows is not None else torch.arange(len(inputs.train_images))
    is_kept = torch.zeros(len(inputs.train_images), dtype=torch.bool)
    is_kept[rows if is_read else rows[:0]] = True
    total: functional.FeatureMoments | None = None
    pixels = torch.zeros((), dtype=torch.float64, device=inputs.device)
    kept, at = [], 0
    for batch in inputs.train_images.split(_BATCH):
        there = batch.to(inputs.device)
        search.add(there)
        pixels = pixels + there.sum(0, dtype=torch.float64)
        moments = functional.FeatureMoments.of(features(there))
        total = moments if total is None else total + moments
        if (here := is_kept[at : at + len(batch)]).any():
            kept.append(thumbnails(batch[here]))
        at += len(batch)
    assert total is not None, "`check` refuses an empty training set"
    mean_image = functional.to_uint8(pixels / at / 255).cpu()
    if not is_read:
        return total, mean_image, None
    # They came by index; the reader is trained in the order of `rows`.
    order = torch.argsort(torch.argsort(rows)).numpy()
    return total, mean_image, ClassReader.fit_thumbnails(np.concatenate(kept)[order], inputs.train_labels[rows])


def code_batches(values: ArrayLike | CodeBatches) -> Iterator[Tensor]:
    """Yield codes as int64 (n, N), in batches if they are not in memory."""
    if isinstance(values, CodeBatches):
        yield from map(as_codes, values.batches())
    else:
        yield as_codes(values)


def rows_of(values: ArrayLike | CodeBatches) -> int:
    """Count the rows of codes."""
    return len(values) if isinstance(values, CodeBatches) else len(np.asarray(values))


def as_codes(values: ArrayLike) -> Tensor:
    """Convert codes or class ids of any integer type (uint16 included) to int64."""
    return torch.from_numpy(np.asarray(values).astype(np.int64))


def check(inputs: EvaluationInputs) -> None:
    """Check that the inputs belong together, before anything is computed.

    Raises:
        ValueError: counts disagree, or a split is too small to evaluate.
    """
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
            raise ValueError(f"{split}: {lengths} must be one for one; look for missing shards")
        if min(lengths.values()) < 2:
            raise ValueError(
                f"{split}: {lengths} are too few to evaluate: at least 2, and some hundreds for meaningful scores"
            )
