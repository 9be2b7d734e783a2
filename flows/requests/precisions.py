"""Precisions that a machine multiplies in more slowly than in fp32: found in what is to run, said before it begins."""

import logging
from collections.abc import Collection, Mapping

from flows.recipes.schema import Recipe
from infra.config import Precision
from infra.settings import Settings

HALF: tuple[Precision, ...] = ("bf16", "fp16")

log = logging.getLogger(__name__)


def precisions_of(recipe: Recipe, stages: Collection[str] | None = None) -> dict[str, str]:
    """Return the precision of everything that a run computes, by the option that sets it; `recipe` has its device.

    Args:
        recipe: what is run.
        stages: those that are run, and "decoding" where codes are decoded by another stage than evaluate; None: all.
    """
    evaluate = recipe.evaluate
    found: dict[str, str] = {}
    if recipe.teacher.origin == "trained":
        found["teacher.training.precision"] = recipe.teacher.training.precision
    if not recipe.align.from_scratch:
        found["warm_up.training.precision"] = recipe.warm_up.training.precision
    found |= {
        "align.training.precision": recipe.align.training.precision,
        "fine_tune.training.precision": recipe.fine_tune.training.precision,
        "encode.precision": recipe.encode.precision,
        "train_generator.precision": recipe.train_generator.precision,
        "sample.precision": recipe.sample.precision,
        "decoding.precision": recipe.decoding.precision,
    }
    if recipe.second is not None:
        found["evaluate.sweep.train_generator.precision"] = recipe.second.train_generator.precision
    if evaluate.scores.protocol != "none":
        found["evaluate.scores.precision"] = evaluate.scores.precision
    if stages is None or "evaluate" in stages:
        return found
    return {name: value for name, value in found.items() if name.partition(".")[0] in stages}


def warn_of_slow(chosen: Mapping[str, str], settings: Settings, device: str) -> None:
    """Log a line for each precision that does not pay on a device of this machine, with the options that chose it.

    Nothing is said of a Ray cluster's machines, which may be others.
    """
    for precision in HALF:
        options = [option for option, value in chosen.items() if value == precision]
        if not options or settings.ray_address:
            continue
        from infra.compute.precision import slow_because  # with torch, which takes seconds to import

        if reason := slow_because(precision, device):
            remedy = ", ".join(f"{option}=fp32" for option in options)
            log.warning("%s = %s: %s; %s would be faster", ", ".join(options), precision, reason, remedy)
