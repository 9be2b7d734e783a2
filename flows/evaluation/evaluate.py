"""Evaluation of reconstructions and samples: scores, each with its protocol, and the pictures beside them.

Composes evaluators over plain arrays and callables; independent of models and of storage.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flows.evaluation.gallery import (
    Pictures,
    extreme_gallery,
    extremes_shown,
    neighbour_gallery,
    reconstruction_gallery,
    reconstructions_shown,
    sample_gallery,
    samples_shown,
)
from flows.recipes.schema import EvaluateConfig
from flows.results.types import (
    ConfusionMatrix,
    EvaluationReport,
    FinalAgreement,
    Gallery,
    GenerationReport,
    ReconstructionReport,
    StepScores,
)
from infra.progress import Progress, silent
from sftok.evaluation.generation import measure_generation
from sftok.evaluation.meters import EvaluationInputs, Meters, check
from sftok.evaluation.reconstruction import StepOutcome, measure_codebook, measure_step
from sftok.evaluation.samples import SampleSummary, evenly, summarize_samples
from sftok.metrics.class_reader import ClassReader, confusion_matrix
from sftok.metrics.functional import to_uint8
from sftok.metrics.random_features import RandomFeatures


class EvaluationResult(NamedTuple):
    """The report, and a PNG for each picture that it names."""

    report: EvaluationReport
    images: dict[str, bytes]
    reader: ClassReader | None
    """trained on the real images; None if the recipe has none."""


def evaluate(
    inputs: EvaluationInputs, config: EvaluateConfig, *, seed: int, progress: Progress = silent
) -> EvaluationResult:
    """Score samples and reconstructions in one pass each: samples, training images, then each number of decoding steps.

    Raises:
        ValueError: counts or shapes disagree, or there are too few images to score.
    """
    check(inputs)
    total, is_read = len(config.steps) + 2, config.class_reader
    features = RandomFeatures(config.feature_seed, inputs.val_images.shape[-1])
    samples = summarize_samples(
        inputs, features, is_read=is_read, nearest_images=config.nearest_images, shown=samples_shown
    )
    meters = Meters.of(
        inputs,
        seed=seed,
        features=features,
        queries=(samples.near, inputs.val_images[evenly(len(inputs.val_images), config.nearest_images)]),
        is_read=is_read,
    )
    progress(1, total, {})
    steps, pictures, shown = {}, Pictures(), reconstructions_shown(inputs.val_labels)
    for done, num_steps in enumerate(config.steps):
        steps[num_steps] = measure_step(meters, num_steps, shown)
        progress(2 + done, total, {})
    reconstruction = _reconstruction(meters, steps, pictures)
    generation = _generation(meters, samples, pictures)
    progress(total, total, {})
    report = EvaluationReport(
        class_names=inputs.class_names,
        image_size=inputs.val_images.shape[-1],
        reconstruction=reconstruction,
        generation=generation,
    )
    return EvaluationResult(report, pictures.images, meters.reader)


def _reconstruction(meters: Meters, steps: dict[int, StepOutcome], pictures: Pictures) -> ReconstructionReport:
    inputs = meters.inputs
    scores, usage = measure_codebook(meters)
    return ReconstructionReport(
        by_steps=tuple(StepScores(num_steps=count, measures=outcome.scores) for count, outcome in steps.items()),
        measures=scores,
        gallery=reconstruction_gallery(
            pictures,
            inputs.val_images,
            {count: outcome.shown for count, outcome in steps.items()},
            class_ids=inputs.val_labels,
            class_names=inputs.class_names,
        ),
        extremes=_extremes(inputs, *list(steps.items())[-1], pictures),
        agreement=_agreement(inputs),
        usage=usage,
    )


def _agreement(inputs: EvaluationInputs) -> FinalAgreement | None:
    if inputs.agreement is None:
        return None
    found, num_images = inputs.agreement(), len(inputs.val_images)
    return FinalAgreement(
        num_steps=inputs.facts.num_steps, num_images=num_images, kl=tuple(found.kl), top1=tuple(found.top1)
    )


def _extremes(inputs: EvaluationInputs, num_steps: int, outcome: StepOutcome, pictures: Pictures) -> Gallery:
    """Show the best and worst reconstructions, decoded again: which ones is known only at the end."""
    chosen = sorted({i for row in extremes_shown(outcome.psnr).values() for i in row})
    parts = [to_uint8(made.images).cpu() for made in inputs.reconstruct(num_steps, chosen)]
    return extreme_gallery(
        pictures,
        inputs.val_images,
        dict(zip(chosen, torch.cat(parts), strict=True)),
        outcome.psnr,
        class_ids=inputs.val_labels,
        class_names=inputs.class_names,
    )


def _generation(meters: Meters, samples: SampleSummary, pictures: Pictures) -> GenerationReport:
    inputs, classes, names = meters.inputs, samples.classes, meters.inputs.class_names
    outcome = measure_generation(meters, samples)
    return GenerationReport(
        measures=outcome.scores,
        gallery=sample_gallery(pictures, samples.shown, class_ids=classes, class_names=names),
        neighbours=neighbour_gallery(
            pictures,
            dict(zip(samples.looked.tolist(), samples.near, strict=True)),
            nearest=meters.nearest[0],
            train=inputs.train_images,
            class_ids=classes[samples.looked],
            class_names=names,
        ),
        distances=outcome.distances,
        confusion=_confusion(outcome.predicted, classes, names),
        real_confusion=_confusion(outcome.predicted_real, inputs.val_labels, names),
    )


def _confusion(predicted: Tensor | None, classes: Tensor, names: Sequence[str]) -> ConfusionMatrix | None:
    """Count the classes that are read in images of each class; images without a class do not count."""
    if predicted is None:
        return None
    has_class = classes >= 0
    counts = confusion_matrix(predicted[has_class], classes[has_class], len(names))
    return ConfusionMatrix(counts=tuple(tuple(row) for row in counts.tolist()))
