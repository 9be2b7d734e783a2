"""The samples as they pass, once: decoded some at a time, seen by all that measures them, and few of them kept."""

from dataclasses import dataclass

import torch
from torch import Tensor

from flows.evaluation.gallery import samples_shown
from flows.evaluation.meters import EvaluationInputs, FeatureMeter, as_codes
from sftok.metrics import functional
from sftok.metrics.class_reader import thumbnail_rows
from sftok.metrics.image_meter import ImageMeter
from sftok.metrics.random_features import RandomFeatures


@dataclass(frozen=True)
class SamplesSeen:
    """What is left of the samples when they have passed."""

    classes: Tensor
    features: Tensor
    """(n, D), random ones."""
    thumbnails: Tensor | None
    """(n, 64) float64; None where no classes are read."""
    looked: Tensor
    """indices of those whose nearest training image is looked for."""
    near: Tensor
    """their images, uint8."""
    shown: dict[int, Tensor]
    """images of the gallery, by index."""
    scored: FeatureMeter | None
    """what the scorer has seen; None where nothing is scored."""

    def __len__(self) -> int:
        return len(self.classes)


def see_samples(
    inputs: EvaluationInputs, features: RandomFeatures, *, is_read: bool, nearest_images: int
) -> SamplesSeen:
    """Decode all samples, once.

    Raises:
        ValueError: there are more or fewer samples than classes.
    """
    classes, meter = as_codes(inputs.sample_classes), ImageMeter()
    looked = evenly(len(classes), nearest_images)
    wanted, shown = set(looked.tolist()) | (chosen := set(samples_shown(classes))), {}
    scored = inputs.scorer.meter() if inputs.scorer else None
    for part in inputs.decode_samples():
        images = functional.to_uint8(part)
        for index in range(meter.count, meter.count + len(images)):
            if index in wanted:
                shown[index] = images[index - meter.count].to("cpu", copy=True)  # and not the whole batch
        read = {"thumbnails": thumbnail_rows(images)} if is_read else {}
        meter.add(features=features(images), **read)
        if scored is not None:
            scored.add(images)
    if meter.count != len(classes):
        raise ValueError(f"{meter.count} decoded samples, but {len(classes)} sample classes")
    return SamplesSeen(
        classes=classes,
        features=meter["features"],
        thumbnails=meter["thumbnails"] if is_read else None,
        looked=looked,
        near=torch.stack([shown[index] for index in looked.tolist()]),
        shown={index: image for index, image in shown.items() if index in chosen},
        scored=scored,
    )


def evenly(count: int, most: int) -> Tensor:
    """Indices of at most `most` of `count`, spread evenly: each is compared with every training image."""
    return torch.linspace(0, count - 1, min(count, most)).round().long()
