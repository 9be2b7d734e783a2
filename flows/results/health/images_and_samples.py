"""Judge what was evaluated: reconstructions by the mean image and the teacher, samples by their classes and copies."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from flows.results.health.cases import GENERATORS, Case, Limits, facts, share
from flows.results.health.figures import Figures
from flows.results.types import ConfusionMatrix, Evidence, SweepPoint

NAMED = 5  # classes that a sentence names


def blind_teacher(figures: Figures, limits: Limits) -> Iterator[Case]:
    """Judge the teacher's reconstructions by what the mean of all images has in common with an image."""
    yield from _blind(figures, limits, "teacher", figures.teacher_psnr, "The teacher's reconstructions", ("teacher",))


def blind(figures: Figures, limits: Limits) -> Iterator[Case]:
    """Judge the tokenizer's reconstructions by what the mean of all images has in common with an image."""
    yield from _blind(figures, limits, "", figures.psnr, "Reconstructions", ("warm_up", "align", "fine_tune"))


def _blind(
    figures: Figures, limits: Limits, stage: str, psnr: float | None, what: str, longer: tuple[str, ...]
) -> Iterator[Case]:
    mean = figures.mean_image_psnr
    if psnr is not None and mean is not None and psnr < mean + limits["gain"]:
        yield Case(
            f"{what} hardly depend on the image: their PSNR is {psnr:.1f} dB, that of the mean image {mean:.1f} dB.",
            facts("dB", {"PSNR": psnr, "mean image": mean, "limit": mean + limits["gain"]}),
            stage,
            longer=longer,
        )


def behind_teacher(figures: Figures, limits: Limits) -> Iterator[Case]:
    """Judge how much the tokenizer keeps of what the teacher gains over the mean image, on the same images."""
    teacher, mean, tuned = figures.teacher_psnr, figures.mean_image_psnr, figures.trainings.get("fine_tune")
    own = tuned.last("val_psnr") if tuned else None
    if own is None or teacher is None or mean is None or teacher <= mean:
        return
    kept = (own - mean) / (teacher - mean)
    if kept < limits["kept"]:
        yield Case(
            f"The tokenizer is far behind its teacher: {own:.1f} dB of PSNR against {teacher:.1f} dB, where the mean "
            f"image has {mean:.1f} dB.",
            (
                *facts("dB", {"PSNR": own, "teacher": teacher, "mean image": mean}),
                *facts("%", {"gain that is kept": kept, "limit": limits["kept"]}),
            ),
            longer=("warm_up", "align"),
        )


def copies(figures: Figures, limits: Limits) -> Iterator[Case]:
    """Judge the share of samples whose codes are, all in all, those of a training image."""
    drawn, real = (figures.metrics.get(f"{who}.verbatim_share") for who in ("generation", "real"))
    if drawn is None or real is None or drawn <= limits["share"]:
        return
    so_do = f"; so do {share(real)} of held-out images: the codes tell few images apart" * (real > limits["share"])
    yield Case(
        f"{share(drawn)} of the samples repeat the codes of a training image{so_do}.",
        facts("%", {"samples": drawn, "held-out images": real, "limit": limits["share"]}),
    )


def classes_ignored(figures: Figures, limits: Limits) -> Iterator[Case]:
    """Judge how far samples are from guessing towards real images in being read as the class that is meant."""
    shown = figures.classes_shown
    if shown is None or shown >= limits["shown"]:
        return
    drawn, real = (figures.metrics[f"{who}.class_agreement"] for who in ("generation", "real"))
    least = figures.chance + limits["shown"] * (real - figures.chance)
    yield Case(
        f"The samples hardly show their classes: {share(drawn)} are read as the class that is meant, of real images "
        f"{share(real)}, by guessing {share(figures.chance)}.",
        facts("%", {"samples": drawn, "real images": real, "guessing": figures.chance, "limit": least}),
        longer=("train_generator",),
    )


def guidance_without_effect(figures: Figures, limits: Limits) -> Iterator[Case]:
    """Judge whether guidance makes the samples of a sweep's generators more accurate, where there is room for it."""
    real = figures.metrics.get("real.class_agreement", 0.0)
    for stage, generator in zip(GENERATORS, dict.fromkeys(point.generator for point in figures.sweep), strict=False):
        points = [point for point in figures.sweep if point.generator == generator]
        gains = [gain for some in _by_temperature(points) if (gain := _gain(some, real)) is not None]
        gains = [gain for gain in gains if gain.room > 2 * limits["noise"]]
        if gains and all(gain.gain <= limits["noise"] for gain in gains):
            reached = max(point.class_accuracy for point in points)
            yield Case(
                f"Guidance does nothing for the {generator} generator: at any scale at most {share(reached)} of its "
                f"samples are read as the class that is meant; of real images {share(real)}.",
                (
                    *facts("%", {"best of the sweep": reached, "real images": real}),
                    *facts(
                        "",
                        {"gain, in standard errors": max(gain.gain for gain in gains), "limit": limits["noise"]},
                    ),
                ),
                stage,
                longer=(stage,),
            )


class _Gain(NamedTuple):
    """What guidance adds to the accuracy at a temperature, and what it could add, in standard errors."""

    gain: float
    room: float


def _gain(points: Sequence[SweepPoint], real: float) -> _Gain | None:
    """Compare the best of the guided points with the one without guidance, or the least guided; None without two."""
    unguided = [point for point in points if point.cfg_scale <= 1] or points
    base = (max if unguided is not points else min)(unguided, key=lambda point: point.cfg_scale)
    guided = [point for point in points if point.cfg_scale > base.cfg_scale]
    if not guided:
        return None
    best = max(guided, key=lambda point: point.class_accuracy)
    mean = (best.class_accuracy + base.class_accuracy) / 2
    error = math.sqrt(max(2 * mean * (1 - mean) / best.samples, best.samples**-2))
    return _Gain((best.class_accuracy - base.class_accuracy) / error, (real - base.class_accuracy) / error)


def _by_temperature(points: Sequence[SweepPoint]) -> list[list[SweepPoint]]:
    temperatures = dict.fromkeys(point.temperature for point in points)
    return [[point for point in points if point.temperature == one] for one in temperatures]


def classes_missing(figures: Figures, limits: Limits) -> Iterator[Case]:
    """Judge the samples of each class that is read right on real images, unless the classes are ignored altogether."""
    shown = figures.classes_shown
    if shown is None or shown < limits["shown"] or figures.confusion is None or figures.real_confusion is None:
        return
    missing: dict[str, float] = {}
    recalls = zip(_recalls(figures.confusion), _recalls(figures.real_confusion), strict=True)
    for name, ((right, count), (known, held_out)) in zip(figures.class_names, recalls, strict=True):
        if count >= limits["fewest"] and right <= limits["right"] * count and 0 < held_out <= 2 * known:
            missing[name] = right / count
    if not missing:
        return
    named = dict(list(missing.items())[:NAMED])
    more = f" and {len(missing) - NAMED} more" * (len(missing) > NAMED)
    yield Case(
        f"{len(missing)} of {len(figures.class_names)} classes are never drawn right, though real images of them are "
        f"read right: {', '.join(named)}{more}.",
        (*facts("%", named), Evidence(label="limit", value=limits["right"], unit="%")),
        longer=("train_generator",),
    )


def _recalls(matrix: ConfusionMatrix) -> list[tuple[int, int]]:
    """Return how many images of each class were read right, and how many there are."""
    return [(row[at], sum(row)) for at, row in enumerate(matrix.counts)]
