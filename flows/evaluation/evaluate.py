"""The evaluate stage: how faithful reconstructions are, how good samples are, and how each figure came about.

Composes the metrics over plain arrays and callables, so that it knows neither models nor where anything is kept.
"""

from typing import NamedTuple

from flows.evaluation.generation import measure_generation
from flows.evaluation.meters import EvaluationFacts, EvaluationInputs, Instruments, Reconstructed, check
from flows.evaluation.reconstruction import measure_reconstruction
from flows.evaluation.samples import evenly, see_samples
from flows.recipes.small import EvaluateConfig
from flows.results.types import EvaluationReport
from infra.progress import Progress, silent
from sftok.metrics.random_features import RandomFeatures

__all__ = ["Evaluated", "EvaluationFacts", "EvaluationInputs", "Reconstructed", "evaluate"]


class Evaluated(NamedTuple):
    """The report, and the PNG of each picture that it names."""

    report: EvaluationReport
    images: dict[str, bytes]


def evaluate(inputs: EvaluationInputs, config: EvaluateConfig, *, seed: int, progress: Progress = silent) -> Evaluated:
    """Pass the samples, then the training images, then reconstructions at each step count; and hold all side by side.

    Raises:
        ValueError: counts or shapes disagree, or there are too few images to measure.
    """
    check(inputs)
    total = len(config.steps) + 2
    features = RandomFeatures(config.feature_seed, inputs.val_images.shape[-1])
    samples = see_samples(inputs, features, is_read=config.class_reader, nearest_images=config.nearest_images)
    held_out = inputs.val_images[evenly(len(inputs.val_images), config.nearest_images)]
    tools = Instruments.of(inputs, config, seed, features=features, queries=(samples.near, held_out))
    progress(1, total, {})
    reconstruction = measure_reconstruction(tools, config.steps, step_done=lambda done: progress(1 + done, total, {}))
    generation = measure_generation(tools, samples)
    progress(total, total, {})
    report = EvaluationReport(
        class_names=inputs.class_names,
        image_size=inputs.val_images.shape[-1],
        reconstruction=reconstruction,
        generation=generation,
    )
    return Evaluated(report, tools.pictures.images)
