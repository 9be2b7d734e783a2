"""Judge the figures of a run, one function per rule of `flows.results.health`: from figures and limits to cases."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from flows.results.figures import Figures, Training
from flows.results.types import ConfusionMatrix, Evidence, SweepPoint

GENERATORS = ("train_generator", "train_second_generator")
VALIDATED = {  # figure by which the validations of a training are judged, its unit, and the sign that makes it a gain
    "teacher": ("val_psnr", "dB", 1),
    "warm_up": ("val_agreement_8", "%", 1),
    "align": ("val_agreement_8", "%", 1),
    "fine_tune": ("val_psnr", "dB", 1),
    "train_generator": ("val_nll", "nats", -1),
    "train_second_generator": ("val_nll", "nats", -1),
}
FEWEST_LINES = 4  # of a log, for a slope and its noise
FEWEST_VALIDATIONS = 3
NAMED = 5  # classes that a sentence names

Limits = Mapping[str, float]


class Case(NamedTuple):
    """What a rule found."""

    sentence: str
    evidence: tuple[Evidence, ...]
    stage: str = ""
    """the training that it is about; empty: the run."""
    longer: tuple[str, ...] = ()
    """trainings that more steps may help."""
    best: int = 0
    """step of the best validation."""


def teacher_codes(figures: Figures, limits: Limits) -> Iterator[Case]:
    """Judge the share of the teacher's codebook that held-out images use."""
    yield from _validated_codes(figures, limits, "teacher")


def codes(figures: Figures, limits: Limits) -> Iterator[Case]:
    """Judge the codes of all training images where they were counted, else those of the tokenizer's validations."""
    perplexity, usage = (figures.metrics.get(f"codebook.{name}_training") for name in ("perplexity", "usage"))
    if perplexity is None or usage is None:
        for stage in ("warm_up", "align"):
            yield from _validated_codes(figures, limits, stage)
        return
    least = limits["share"] * figures.reachable * figures.codebook_size
    if perplexity < least:
        yield Case(
            f"The codebook has collapsed: training images use {_share(usage)} of its {figures.codebook_size:,} codes, "
            f"and say no more than {perplexity:.3g} equally likely ones would.",
            (_share_of("codes in use", usage), _codes("perplexity", perplexity), _codes("limit", least)),
            longer=("warm_up", "align"),
        )


def _validated_codes(figures: Figures, limits: Limits, stage: str) -> Iterator[Case]:
    training = figures.trainings.get(stage)
    usage = training.last("val_code_usage") if training else None
    if training is None or usage is None:
        return
    least = limits["share"] * training.reachable
    if usage < least:
        yield Case(
            f"{stage}: the codebook has collapsed: held-out images use {_share(usage)} of its codes.",
            (_share_of("codes in use", usage), _share_of("limit", least)),
            stage,
            longer=(stage,),
        )


def blind_teacher(figures: Figures, limits: Limits) -> Iterator[Case]:
    """Judge the teacher's reconstructions by what the mean of all images has in common with an image."""
    yield from _blind(figures, limits, "teacher", _teacher(figures), "The teacher's reconstructions", ("teacher",))


def blind(figures: Figures, limits: Limits) -> Iterator[Case]:
    """Judge the tokenizer's reconstructions by what the mean of all images has in common with an image."""
    yield from _blind(figures, limits, "", figures.psnr, "Reconstructions", ("warm_up", "align", "fine_tune"))


def _blind(
    figures: Figures, limits: Limits, stage: str, psnr: float | None, what: str, longer: tuple[str, ...]
) -> Iterator[Case]:
    mean = _mean_image(figures)
    if psnr is not None and mean is not None and psnr < mean + limits["gain"]:
        yield Case(
            f"{what} hardly depend on the image: their PSNR is {psnr:.1f} dB, that of the mean image {mean:.1f} dB.",
            (_decibels("PSNR", psnr), _decibels("mean image", mean), _decibels("limit", mean + limits["gain"])),
            stage,
            longer=longer,
        )


def behind_teacher(figures: Figures, limits: Limits) -> Iterator[Case]:
    """Judge how much the tokenizer keeps of what the teacher gains over the mean image, on the same images."""
    teacher, mean, tuned = _teacher(figures), _mean_image(figures), figures.trainings.get("fine_tune")
    own = tuned.last("val_psnr") if tuned else None
    if own is None or teacher is None or mean is None or teacher <= mean:
        return
    kept = (own - mean) / (teacher - mean)
    if kept < limits["kept"]:
        yield Case(
            f"The tokenizer is far behind its teacher: {own:.1f} dB of PSNR against {teacher:.1f} dB, where the mean "
            f"image has {mean:.1f} dB.",
            (
                _decibels("PSNR", own),
                _decibels("teacher's PSNR", teacher),
                _decibels("mean image", mean),
                _share_of("gain that is kept", kept),
                _share_of("limit", limits["kept"]),
            ),
            longer=("warm_up", "align"),
        )


def still_falling(figures: Figures, limits: Limits) -> Iterator[Case]:
    """Judge losses over the last part of their logs: how fast they fall against the whole log, and how surely."""
    evidence = {}
    for stage, training in figures.trainings.items():
        losses = [loss for _, loss in training.logged("loss")]
        if len(losses) < FEWEST_LINES:
            continue
        last = losses[-max(FEWEST_LINES, round(limits["part"] * len(losses))) :]
        fall, noise, end = fitted(last)
        whole = losses[0] - end
        part = len(last) / len(losses)
        if whole > 0 and fall > limits["speed"] * part * whole and fall > limits["noise"] * noise:
            evidence[stage] = (
                _share_of(f"{stage}: share of the fall", fall / whole),
                _share_of("in the last part of the log,", part),
            )
    if evidence:
        yield Case(
            f"The loss is still falling when {_listed(evidence)} end{'s' * (len(evidence) == 1)}.",
            tuple(itertools.chain.from_iterable(evidence.values())),
            next(iter(evidence)) if len(evidence) == 1 else "",
            longer=tuple(evidence),
        )


def fitted(values: Sequence[float]) -> tuple[float, float, float]:
    """Fit a line to values at equal distances; return its fall, the standard error of that, and where it ends."""
    count = len(values)
    mean, middle = sum(values) / count, (count - 1) / 2
    spread = sum((at - middle) ** 2 for at in range(count))
    slope = sum((at - middle) * value for at, value in enumerate(values)) / spread
    residual = sum((value - mean - slope * (at - middle)) ** 2 for at, value in enumerate(values))
    error = math.sqrt(residual / (count - 2) / spread)
    return -slope * (count - 1), error * (count - 1), mean + slope * middle


def over_fitted(figures: Figures, limits: Limits) -> Iterator[Case]:
    """Judge whether a training's validations got worse after the best one while its loss went on falling."""
    for stage, training in figures.trainings.items():
        if stage not in VALIDATED:
            continue
        name, unit, sign = VALIDATED[stage]
        found = training.logged(name)
        if len(found) < FEWEST_VALIDATIONS:
            continue
        step, best = max(found, key=lambda one: sign * one[1])
        worse = sign * (best - found[-1][1])
        if worse <= limits[unit] or not _falls_after(training, step):
            continue
        kept = f"those of step {step:,}" if f"best_{name}" in training.lines[-1] else "the last ones"
        yield Case(
            f"{stage} over-fits: on held-out images {name} was best at step {step:,}, and got worse by "
            f"{worse:.3g} since, while the loss fell. The weights that are kept are {kept}.",
            (
                Evidence(label=f"{name} at step {step:,}", value=best, unit=unit),
                Evidence(label=f"{name} at step {found[-1][0]:,}", value=found[-1][1], unit=unit),
                Evidence(label="limit", value=limits[unit], unit=unit),
            ),
            stage,
            best=step,
        )


def _falls_after(training: Training, step: int) -> bool:
    """Return whether the mean loss after a step is lower than in as many logged lines up to it."""
    losses = training.logged("loss")
    after = [loss for at, loss in losses if at > step]
    before = [loss for at, loss in losses if at <= step][-len(after) :]
    return bool(after and before) and sum(after) / len(after) < sum(before) / len(before)


def no_better_than_frequencies(figures: Figures, limits: Limits) -> Iterator[Case]:
    """Judge each generator's held-out NLL by that of class-and-position frequencies."""
    for stage in GENERATORS:
        measured = figures.trainings[stage].metrics if stage in figures.trainings else {}
        nll, frequencies = measured.get("val_nll"), measured.get("frequency_nll")
        if nll is not None and frequencies is not None and nll > frequencies - limits["margin"]:
            yield Case(
                f"{stage}: the generator predicts held-out codes no better than the frequencies of codes by class and "
                f"position: {nll:.3f} nats a code against {frequencies:.3f}.",
                (_nats("held-out NLL", nll), _nats("of frequencies", frequencies), _nats("margin", limits["margin"])),
                stage,
                longer=(stage,),
            )


def copies(figures: Figures, limits: Limits) -> Iterator[Case]:
    """Judge the share of samples whose codes are, all in all, those of a training image."""
    drawn, real = (figures.metrics.get(f"{who}.verbatim_share") for who in ("generation", "real"))
    if drawn is None or real is None or drawn <= limits["share"]:
        return
    so_do = f"; so do {_share(real)} of held-out images: the codes tell few images apart" * (real > limits["share"])
    yield Case(
        f"{_share(drawn)} of the samples repeat the codes of a training image{so_do}.",
        (_share_of("samples", drawn), _share_of("held-out images", real), _share_of("limit", limits["share"])),
    )


def classes_ignored(figures: Figures, limits: Limits) -> Iterator[Case]:
    """Judge how far samples are from guessing towards real images in being read as the class that is meant."""
    shown = figures.classes_shown
    if shown is None or shown >= limits["shown"]:
        return
    drawn, real = (figures.metrics[f"{who}.class_agreement"] for who in ("generation", "real"))
    yield Case(
        f"The samples hardly show their classes: {_share(drawn)} are read as the class that is meant, of real images "
        f"{_share(real)}, by guessing {_share(figures.chance)}.",
        (
            _share_of("samples", drawn),
            _share_of("real images", real),
            _share_of("guessing", figures.chance),
            _share_of("limit", figures.chance + limits["shown"] * (real - figures.chance)),
        ),
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
                f"Guidance does nothing for the {generator} generator: at any scale at most {_share(reached)} of its "
                f"samples are read as the class that is meant; of real images {_share(real)}.",
                (
                    _share_of("best of the sweep", reached),
                    _share_of("real images", real),
                    Evidence(label="gain, in standard errors", value=max(gain.gain for gain in gains)),
                    Evidence(label="limit", value=limits["noise"]),
                ),
                stage,
                longer=(stage,),
            )


class _Gain(NamedTuple):
    """What guidance adds to the accuracy at a temperature, and what it could add, in standard errors."""

    gain: float
    room: float


def _gain(points: Sequence[SweepPoint], real: float) -> _Gain | None:
    """Compare the best of the guided points with the one without guidance (or the least); None without two."""
    base = max((p for p in points if p.cfg_scale <= 1), key=lambda p: p.cfg_scale, default=None)
    base = base or min(points, key=lambda p: p.cfg_scale)
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
    missing = []
    for name, drawn, real in zip(
        figures.class_names, _recalls(figures.confusion), _recalls(figures.real_confusion), strict=True
    ):
        (right, count), (known, held_out) = drawn, real
        if count >= limits["fewest"] and right <= limits["right"] * count and held_out and known >= held_out / 2:
            missing.append((name, right / count))
    if missing:
        more = f" and {len(missing) - NAMED} more" * (len(missing) > NAMED)
        yield Case(
            f"{len(missing)} of {len(figures.class_names)} classes are never drawn right: "
            f"{', '.join(name for name, _ in missing[:NAMED])}{more}.",
            tuple(_share_of(name, share) for name, share in missing[:NAMED])
            + (_share_of("limit", limits["right"]),),
            longer=("train_generator",),
        )


def _recalls(matrix: ConfusionMatrix) -> list[tuple[int, int]]:
    """Return how many images of each class were read right, and how many there are."""
    return [(row[at], sum(row)) for at, row in enumerate(matrix.counts)]


def _teacher(figures: Figures) -> float | None:
    teacher = figures.trainings.get("teacher")
    return teacher.last("val_psnr") if teacher else None


def _mean_image(figures: Figures) -> float | None:
    return figures.metrics.get("real.psnr_mean_image")


def _listed(names: Iterable[str]) -> str:
    *some, last = names
    return f"{', '.join(some)} and {last}" if some else last


def _share(value: float) -> str:
    return f"{100 * value:.3g} %"


def _share_of(label: str, value: float) -> Evidence:
    return Evidence(label=label, value=value, unit="%")


def _decibels(label: str, value: float) -> Evidence:
    return Evidence(label=label, value=value, unit="dB")


def _codes(label: str, value: float) -> Evidence:
    return Evidence(label=label, value=value, unit="codes")


def _nats(label: str, value: float) -> Evidence:
    return Evidence(label=label, value=value, unit="nats")
