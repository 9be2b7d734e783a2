"""Collect the figures that rules judge a run by: from the logs of its trainings, and from its evaluation."""

import json
from collections.abc import Mapping, Sequence

from flows.recipes.schema import Recipe
from flows.results.health.figures import Figures, Training, reachable
from flows.results.types import EvaluationReport, SweepPoint
from infra.artifacts.artifact import Artifact


def training_of(stage: str, artifact: Artifact, recipe: Recipe | None, held_out: int) -> Training | None:
    """Return what a stage's training logged and measured; None if the artifact was not trained.

    Args:
        stage: the stage that made the artifact.
        artifact: what it made.
        recipe: the run's; without it, all codes count as reachable.
        held_out: images that there were to validate on.
    """
    from infra.training.log import LOG  # with torch, as below

    if not any(entry.path == LOG for entry in artifact.manifest.files):
        return None
    lines = tuple(map(json.loads, artifact.folder.read(LOG).decode().splitlines()))
    return Training(
        lines=lines,
        steps=int(lines[-1]["step"]),
        metrics=artifact.manifest.metrics,
        reachable=seen_at_best(stage, recipe, held_out) if recipe else 1.0,
    )


def seen_at_best(stage: str, recipe: Recipe, held_out: int) -> float:
    """Return the share of its codebook that a stage's validations find in use if all codes are equally likely."""
    teacher, tokenizer = recipe.teacher.model, recipe.tokenizer
    if stage == "teacher":
        size, each = teacher.codebook_size, (recipe.data.image_size // teacher.downsample_factor) ** 2
    elif stage in ("warm_up", "align"):
        size, each = tokenizer.codebook_size, tokenizer.num_latent_tokens
    else:
        return 1.0
    from sftok.training.common import VALIDATION_IMAGES

    return reachable(size, each * min(held_out, VALIDATION_IMAGES))


def figures_of(
    trainings: Mapping[str, Training], report: EvaluationReport, sweep: Sequence[SweepPoint], recipe: Recipe | None
) -> Figures:
    """Collect what the rules judge a run by; without a recipe, nothing is said about the tokenizer's codebook."""
    codes = report.find("codebook.usage_training")
    size, each = (recipe.tokenizer.codebook_size, recipe.tokenizer.num_latent_tokens) if recipe else (0, 0)
    return Figures(
        trainings=dict(trainings),
        metrics=report.metrics(),
        codebook_size=size,
        reachable=reachable(size, each * codes.protocol.num_images) if codes else 1.0,
        class_names=report.class_names,
        sweep=tuple(sweep),
        confusion=report.generation.confusion,
        real_confusion=report.generation.real_confusion,
    )
