"""Compare the figures of two runs: which may be compared, how each changed, and the result as frozen data."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field, FiniteFloat

from infra.config import Config

if TYPE_CHECKING:
    from flows.results.types import EvaluationReport, Measure, Protocol

# Seeds draw another sample of the same thing: the figure may move, and that is what a comparison is to show.
CHANCE = frozenset({"seeds"})
Verdict = Literal["better", "worse", "same", "changed"]


class FigureChange(Config):
    """One figure in two runs."""

    name: str
    label: str
    unit: str
    better: Literal["higher", "lower", ""]
    value: FiniteFloat
    other: FiniteFloat
    interval: tuple[FiniteFloat, FiniteFloat] | None = None
    other_interval: tuple[FiniteFloat, FiniteFloat] | None = None
    why_not: str = Field("", description="why the two cannot be compared; empty where they can")

    @property
    def change(self) -> float:
        """How much larger it is now."""
        return self.value - self.other

    @property
    def verdict(self) -> Verdict:
        """What the change is worth; within the wider interval of the two it is none."""
        if self.change == 0 or abs(self.change) <= self.noise:
            return "same"
        if not self.better:
            return "changed"
        return "better" if (self.change > 0) == (self.better == "higher") else "worse"

    @property
    def noise(self) -> float:
        """Half the wider interval; 0 where none was taken."""
        widths = [high - low for low, high in filter(None, (self.interval, self.other_interval))]
        return max(widths, default=0.0) / 2


class Comparison(Config):
    """Two runs."""

    run: str
    other: str
    rows: tuple[FigureChange, ...]
    only_now: tuple[str, ...] = Field((), description="figures that the other run does not have")
    only_then: tuple[str, ...] = Field((), description="figures that this run does not have")
    same_images: bool = Field(description="whether both were measured on the same images")


class GateResult(Config):
    """What the regression gate said of a run."""

    against: str = Field(description="the run that it was held against")
    passed: bool
    held: int = Field(description="figures that were held to a threshold")
    losses: tuple[str, ...] = Field((), description="figures that became worse than they may, in words")
    skipped: tuple[str, ...] = Field((), description="figures with a threshold that could not be compared, and why")


def compare(
    run: str, now: "EvaluationReport", other: str, then: "EvaluationReport", *, same_images: bool
) -> Comparison:
    """Pair the figures of two evaluations by name.

    Args:
        run: the run that is looked at.
        now: its evaluation.
        other: the run that it is held against.
        then: its evaluation.
        same_images: whether the prepared images of both are the same by content.
    """
    ours, theirs = ({measure.name: measure for measure in report.measures()} for report in (now, then))
    rows = tuple(
        FigureChange(
            name=name,
            label=_label(measure),
            unit=measure.unit,
            better=measure.better,
            value=measure.value,
            other=theirs[name].value,
            interval=measure.interval,
            other_interval=theirs[name].interval,
            why_not=why_not(measure.protocol, theirs[name].protocol, same_images=same_images),
        )
        for name, measure in ours.items()
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
    """Why two figures cannot be compared: other images, or the first difference of their protocols; else nothing."""
    if not same_images:
        return "measured on other images"
    ours, theirs = now.as_json(), then.as_json()
    for field in type(now).model_fields:
        if field not in CHANCE and ours[field] != theirs[field]:
            return f"{field.replace('_', ' ')}: {_plain(ours[field])} now, {_plain(theirs[field])} then"
    return ""


def _label(measure: "Measure") -> str:
    steps = measure.protocol.num_steps
    is_stepped = steps is not None and measure.name.endswith(f"@{steps}")
    return f"{measure.label}, {steps} decoding steps" if is_stepped else measure.label


def _plain(value: object) -> str:
    return "none" if value in ("", None) else str(value)
