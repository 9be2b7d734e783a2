"""The evaluate stage: how faithful reconstructions are, how good samples are, and how each figure came about.

Composes the metrics over plain arrays and callables, so that it knows neither models nor where anything is kept.
"""

from typing import NamedTuple

from flows.generation import measure_generation
from flows.instruments import EvaluationFacts, EvaluationInputs, Instruments, Reconstructed, check
from flows.recipes import EvaluateConfig
from flows.reconstruction import measure_reconstruction
from flows.report_data import EvaluationReport
from infra.progress import Progress, silent

__all__ = ["Evaluated", "EvaluationFacts", "EvaluationInputs", "Reconstructed", "evaluate"]


class Evaluated(NamedTuple):
    """The report, and the PNG of each picture that it names."""

    report: EvaluationReport
    images: dict[str, bytes]


def evaluate(inputs: EvaluationInputs, config: EvaluateConfig, *, seed: int, progress: Progress = silent) -> Evaluated:
    """Measure reconstructions at each step count, then samples, against real images.

    Raises:
        ValueError: counts or shapes disagree, or there are too few images to measure.
    """
    check(inputs)
    total = len(config.steps) + 2
    tools = Instruments.of(inputs, config, seed)
    progress(1, total, {})
    reconstruction = measure_reconstruction(tools, config.steps, step_done=lambda done: progress(1 + done, total, {}))
    generation = measure_generation(tools)
    progress(total, total, {})
    report = EvaluationReport(
        class_names=inputs.class_names,
        image_size=inputs.val_images.shape[-1],
        reconstruction=reconstruction,
        generation=generation,
    )
    return Evaluated(report, tools.pictures.images)
