"""Judge trainings by what they logged: the codes in use, the loss at the end, and the validations."""

import itertools
import math
from collections.abc import Iterator, Sequence

from flows.results.health.cases import GENERATORS, Case, Limits, facts, listed, share
from flows.results.health.figures import Figures, Training
from flows.results.types import Evidence

VALIDATED = {  # figure by which the validations of a training are judged, its unit, and whether lower is better
    "teacher": ("val_psnr", "dB", False),
    "warm_up": ("val_agreement_8", "%", False),
    "align": ("val_agreement_8", "%", False),
    "fine_tune": ("val_psnr", "dB", False),
    "train_generator": ("val_nll", "nats", True),
    "train_second_generator": ("val_nll", "nats", True),
}
FEWEST_LINES = 4  # of a log, for a slope and its noise
FEWEST_VALIDATIONS = 3


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
            f"The codebook has collapsed: training images use {share(usage)} of its {figures.codebook_size:,} codes, "
            f"and say no more than {perplexity:.3g} equally likely ones would.",
            (*facts("%", {"codes in use": usage}), *facts("codes", {"perplexity": perplexity, "limit": least})),
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
            f"{stage}: the codebook has collapsed: held-out images use {share(usage)} of its codes.",
            facts("%", {"codes in use": usage, "limit": least}),
            stage,
            longer=(stage,),
        )


def still_falling(figures: Figures, limits: Limits) -> Iterator[Case]:
    """Judge losses over the last part of their logs: how fast they fall against the whole log, and how surely."""
    evidence: dict[str, tuple[Evidence, ...]] = {}
    for stage, training in figures.trainings.items():
        losses = [loss for _, loss in training.logged("loss")]
        if len(losses) < FEWEST_LINES:
            continue
        last = losses[-max(FEWEST_LINES, round(limits["part"] * len(losses))) :]
        fall, noise, end = fitted(last)
        whole, part = losses[0] - end, len(last) / len(losses)
        if whole > 0 and fall > limits["speed"] * part * whole and fall > limits["noise"] * noise:
            label = f"{stage}: fall in the last {share(part)} of the log"
            evidence[stage] = facts("%", {label: fall / whole})
    if evidence:
        yield Case(
            f"The loss is still falling when {listed(evidence)} end{'s' * (len(evidence) == 1)}.",
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
        name, unit, is_lower_better = VALIDATED[stage]
        found, sign = training.logged(name), -1 if is_lower_better else 1
        if len(found) < FEWEST_VALIDATIONS:
            continue
        step, best = max(found, key=lambda one: sign * one[1])
        end, last = found[-1]
        worse = sign * (best - last)
        if worse <= limits[unit] or not _falls_after(training, step):
            continue
        kept = f"those of step {step:,}" if training.last(f"best_{name}") is not None else "the last ones"
        yield Case(
            f"{stage} over-fits: the loss fell, but {name} of held-out images was best at step {step:,}. The weights "
            f"that are kept are {kept}.",
            (
                Evidence(label=f"at step {step:,}", value=best, unit=unit),
                Evidence(label=f"at step {end:,}", value=last, unit=unit),
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
                facts("nats", {"held-out NLL": nll, "of frequencies": frequencies, "limit": limits["margin"]}),
                stage,
                longer=(stage,),
            )
