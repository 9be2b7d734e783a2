"""Check that there are images enough for all stages of a run, before anything is trained on them."""

from collections.abc import Collection
from typing import TYPE_CHECKING, NamedTuple

from flows.recipes.schema import Recipe, ScoresConfig

if TYPE_CHECKING:
    from sftok.metrics.protocols import ScoreProtocol

# Fewest images that each stage takes; scores of Inception features need more.
HELD_OUT, TRAINED_ON, SAMPLES, SCORED = 2, 2, 2, 20
MEASURING = ("evaluate", "ablation_arm")


class ImageCounts(NamedTuple):
    """Numbers of images that a run has, as far as its source has been read."""

    train: int
    val: int
    classes: int
    remedy: str = "hold out more by a larger data.val_fraction, or put more images into val"
    """how to hold out enough."""


def fewest_held_out(recipe: Recipe, stages: Collection[str]) -> int:
    """Return how many held-out images these stages take."""
    return SCORED if "evaluate" in stages and recipe.evaluate.scores.protocol != "none" else HELD_OUT


def check_counts(recipe: Recipe, counts: ImageCounts, stages: Collection[str]) -> None:
    """Refuse images that are too few, or of too few classes, for one of these stages.

    Raises:
        ValueError: one line with the numbers and the remedy.
    """
    if not any(stage in stages for stage in MEASURING):
        return
    if counts.val < HELD_OUT:
        raise ValueError(f"{_images(counts.val)} held out, at least {HELD_OUT} are evaluated: {counts.remedy}")
    if counts.train < TRAINED_ON:
        raise ValueError(
            f"{_images(counts.train)} to train on, at least {TRAINED_ON} are needed: add images, or hold out fewer by "
            "a smaller data.val_fraction"
        )
    if "evaluate" not in stages:
        return
    evaluate, samples = recipe.evaluate, recipe.sample.per_class * max(counts.classes, 1)
    if evaluate.class_reader and counts.classes < 2:
        sweep = " --set evaluate.sweep.cfg_scales=[]" if evaluate.sweep.cfg_scales else ""
        found = "one class" if counts.classes else "no classes"
        raise ValueError(
            f"evaluate.class_reader = true needs 2 classes, and there {'is' if counts.classes else 'are'} {found}: "
            f"give --set evaluate.class_reader=false{sweep}"
        )
    scores = evaluate.scores
    fewest = SAMPLES if scores.protocol == "none" else scores.num_samples or _protocol(scores).num_images
    if samples < fewest:
        each = -(-fewest // max(counts.classes, 1))
        raise ValueError(
            f"sample.per_class = {recipe.sample.per_class} makes {samples} samples, at least {fewest} are evaluated: "
            f"give --set sample.per_class={each}"
        )
    if scores.protocol == "none":
        return
    without = "or give --set evaluate.scores.protocol=none"
    if counts.val < SCORED:
        raise ValueError(
            f"evaluate.scores.protocol = {scores.protocol} scores {SCORED} images at least, and "
            f"{_images(counts.val)} held out: {counts.remedy}, {without}"
        )
    if not scores.reference and counts.train < (wanted := _protocol(scores).num_reference):
        raise ValueError(
            f"evaluate.scores.protocol = {scores.protocol} takes {wanted:,} reference images at least, and "
            f"{_images(counts.train)} to train on: name a file in evaluate.scores.reference, {without}"
        )


def _protocol(scores: ScoresConfig) -> "ScoreProtocol":
    from sftok.metrics.protocols import PROTOCOLS

    return PROTOCOLS[scores.protocol]


def _images(count: int) -> str:
    return f"{count} image is" if count == 1 else f"{count} images are"
