"""Compare the scores of two runs: which are comparable, how each changed, and the result as frozen data."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field, FiniteFloat

from infra.config import Config

if TYPE_CHECKING:
    from flows.results.types import EvaluationReport
    from sftok.evaluation.results import Protocol, Score

# Seeds draw another sample of the same thing: a comparison is to show how far a score moves with them.
CHANCE = frozenset({"seeds"})
Verdict = Literal["better", "worse", "same", "changed"]


class FigureChange(Config):
    """A score in two runs."""

    name: str
    label: str
    unit: str
    better: Literal["higher", "lower", ""]
    value: FiniteFloat
    other: FiniteFloat
    interval: tuple[FiniteFloat, FiniteFloat] | None = None
    other_interval: tuple[FiniteFloat, FiniteFloat] | None = None
    why_not: str = Field("", description="why the two are not comparable; empty if they are")

    @property
    def change(self) -> float:
        """Return the value now minus the value then."""
        return self.value - self.other

    @property
    def verdict(self) -> Verdict:
        """Classify the change; within the wider interval of the two, the values count as the same."""
        if self.change == 0 or abs(self.change) <= self.noise:
            return "same"
        if not self.better:
            return "changed"
        return "better" if (self.change > 0) == (self.better == "higher") else "worse"

    @property
    def noise(self) -> float:
        """Return half the width of the wider interval; 0 without intervals."""
        widths = [high - low for low, high in filter(None, (self.interval, self.other_interval))]
        return max(widths, default=0.0) / 2


class Comparison(Config):
    """The scores of two runs, paired."""

    run: str
    other: str
    rows: tuple[FigureChange, ...]
    only_now: tuple[str, ...] = Field((), description="scores that the other run does not have")
    only_then: tuple[str, ...] = Field((), description="scores that this run does not have")
    same_images: bool = Field(description="whether both were measured on the same images")


class GateResult(Config):
    """The regression gate's verdict on a run."""

    against: str = Field(description="the baseline run")
    passed: bool
    held: int = Field(description="scores that were checked against a threshold")
    losses: tuple[str, ...] = Field((), description="scores that became worse than allowed, in words")
    skipped: tuple[str, ...] = Field((), description="scores with a threshold that were not comparable, and why")


def compare(
    run: str, now: "EvaluationReport", other: str, then: "EvaluationReport", *, same_images: bool
) -> Comparison:
    """Pair the scores of two evaluations by name.

    Args:
        run: the run to compare.
        now: its evaluation.
        other: the run to compare it with.
        then: its evaluation.
        same_images: whether the prepared images of both are the same by content.
    """
    ours, theirs = ({score.name: score for score in report.scores()} for report in (now, then))
    rows = tuple(
        FigureChange(
            name=name,
            label=_label(score),
            unit=score.unit,
            better=score.better,
            value=score.value,
            other=theirs[name].value,
            interval=score.interval,
            other_interval=theirs[name].interval,
            why_not=why_not(score.protocol, theirs[name].protocol, same_images=same_images),
        )
        for name, score in ours.items()
        if name in theirs
    )
    return Comparison(
        run=run,
        other=other,
        rows=rows,
        only_now=tuple(sorted(ours.keys() - theirs.keys())),
        only_then=tuple(sorted(theirs.keys() - ours.keys())),
        same_images=same_images,
    )


def why_not(now: "Protocol", then: "Protocol", *, same_images: bool) -> str:
    """Explain why two scores are not comparable: other images, or the first difference of their protocols; else ""."""
    if not same_images:
        return "measured on other images"
    ours, theirs = now.as_json(), then.as_json()
    for field in type(now).model_fields:
        if field not in CHANCE and ours[field] != theirs[field]:
            return f"{field.replace('_', ' ')}: {_plain(ours[field])} now, {_plain(theirs[field])} then"
    return ""


def _label(score: "Score") -> str:
    steps = score.protocol.num_steps
    is_stepped = steps is not None and score.name.endswith(f"@{steps}")
    return f"{score.label}, {steps} decoding steps" if is_stepped else score.label


def _plain(value: object) -> str:
    return "none" if value in ("", None) else str(value)
