"""Figures of two runs side by side: how each changed, and whether the two may be compared at all."""

from flows.results.compared import Compared, Comparison
from flows.results.types import EvaluationReport, Measure, Protocol

# Seeds draw another sample of the same thing: the figure may move, and that is what a comparison is to show.
CHANCE = frozenset({"seeds"})


def compare(run: str, now: EvaluationReport, other: str, then: EvaluationReport, *, same_images: bool) -> Comparison:
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
        Compared(
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


def why_not(now: Protocol, then: Protocol, *, same_images: bool) -> str:
    """Why two figures cannot be compared: other images, or the first difference of their protocols; else nothing."""
    if not same_images:
        return "measured on other images"
    ours, theirs = now.as_json(), then.as_json()
    for field in Protocol.model_fields:
        if field not in CHANCE and ours[field] != theirs[field]:
            return f"{field.replace('_', ' ')}: {_plain(ours[field])} now, {_plain(theirs[field])} then"
    return ""


def _label(measure: Measure) -> str:
    steps = measure.protocol.num_steps
    is_stepped = steps is not None and measure.name.endswith(f"@{steps}")
    return f"{measure.label}, {steps} decoding steps" if is_stepped else measure.label


def _plain(value: object) -> str:
    return "none" if value in ("", None) else str(value)
