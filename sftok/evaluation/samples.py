"""One pass over the samples: decoded in batches, given to every meter, and only a few images kept."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from sftok.evaluation.meters import EvaluationInputs, FeatureMeter, as_codes
from sftok.metrics import functional
from sftok.metrics.class_reader import thumbnail_rows
from sftok.metrics.image_meter import ImageMeter
from sftok.metrics.random_features import RandomFeatures


@dataclass(frozen=True)
class SampleSummary:
    """Values kept of the streamed samples."""

    classes: Tensor
    features: Tensor
    """(n, D), random features."""
    thumbnails: Tensor | None
    """(n, 64) float64; None without a class reader."""
    looked: Tensor
    """indices of the samples whose nearest training image is searched for."""
    near: Tensor
    """the images of these, uint8."""
    shown: dict[int, Tensor]
    """images of the gallery, by index."""
    scored: FeatureMeter | None
    """features for the scorer; None without one."""

    def __len__(self) -> int:
        return len(self.classes)


def summarize_samples(
    inputs: EvaluationInputs,
    features: RandomFeatures,
    *,
    is_read: bool,
    nearest_images: int,
    shown: Callable[[Tensor], Collection[int]],
) -> SampleSummary:
    """Decode all samples once, and collect what the scores need, and the images that `shown` selects by their classes.

    Raises:
        ValueError: there are more or fewer samples than classes.
    """
    classes, meter = as_codes(inputs.sample_classes), ImageMeter()
    looked = evenly(len(classes), nearest_images)
    wanted, kept = set(looked.tolist()) | (chosen := set(shown(classes))), {}
    scored = inputs.scorer.meter() if inputs.scorer else None
    for part in inputs.decode_samples():
        images = functional.to_uint8(part)
        for index in range(meter.count, meter.count + len(images)):
            if index in wanted:
                kept[index] = images[index - meter.count].to("cpu", copy=True)  # and not the whole batch
        read = {"thumbnails": thumbnail_rows(images)} if is_read else {}
        meter.add(features=features(images), **read)
        if scored is not None:
            scored.add(images)
    if meter.count != len(classes):
        raise ValueError(f"{meter.count} decoded samples, but {len(classes)} sample classes")
    return SampleSummary(
        classes=classes,
        features=meter["features"],
        thumbnails=meter["thumbnails"] if is_read else None,
        looked=looked,
        near=torch.stack([kept[index] for index in looked.tolist()]),
        shown={index: image for index, image in kept.items() if index in chosen},
        scored=scored,
    )


def evenly(count: int, most: int) -> Tensor:
    """Select at most `most` of `count` indices, evenly spread: each is compared with every training image."""
    return torch.linspace(0, count - 1, min(count, most)).round().long()
