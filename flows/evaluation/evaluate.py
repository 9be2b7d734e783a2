"""Evaluation of reconstructions and samples: scores, each with its protocol, and the pictures beside them.

Composes metrics over plain arrays and callables; independent of models and of storage.
"""

from typing import NamedTuple

from flows.evaluation.generation import measure_generation
from flows.evaluation.meters import EvaluationInputs, Meters, ProtocolFacts, ReconstructionBatch, check
from flows.evaluation.reconstruction import measure_reconstruction
from flows.evaluation.samples import evenly, summarize_samples
from flows.recipes.schema import EvaluateConfig
from flows.results.types import EvaluationReport
from infra.progress import Progress, silent
from sftok.metrics.random_features import RandomFeatures

__all__ = ["EvaluationInputs", "EvaluationResult", "ProtocolFacts", "ReconstructionBatch", "evaluate"]


class EvaluationResult(NamedTuple):
    """The report, and a PNG for each picture that it names."""

    report: EvaluationReport
    images: dict[str, bytes]


def evaluate(
    inputs: EvaluationInputs, config: EvaluateConfig, *, seed: int, progress: Progress = silent
) -> EvaluationResult:
    """Score samples and reconstructions in one pass each: samples, training images, then each number of decoding steps.

    Raises:
        ValueError: counts or shapes disagree, or there are too few images to score.
    """
    check(inputs)
    total = len(config.steps) + 2
    features = RandomFeatures(config.feature_seed, inputs.val_images.shape[-1])
    samples = summarize_samples(inputs, features, is_read=config.class_reader, nearest_images=config.nearest_images)
    held_out = inputs.val_images[evenly(len(inputs.val_images), config.nearest_images)]
    meters = Meters.of(inputs, config, seed, features=features, queries=(samples.near, held_out))
    progress(1, total, {})
    reconstruction = measure_reconstruction(meters, config.steps, step_done=lambda done: progress(1 + done, total, {}))
    generation = measure_generation(meters, samples)
    progress(total, total, {})
    report = EvaluationReport(
        class_names=inputs.class_names,
        image_size=inputs.val_images.shape[-1],
        reconstruction=reconstruction,
        generation=generation,
    )
    return EvaluationResult(report, meters.pictures.images)
