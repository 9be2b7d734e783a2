"""Geometry of the ablation page's charts: one curve per arm, one dot per seed."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from flows.ablation.results import STEP_METRICS, Results, step_column, thinned
from flows.report.charts import Tick, nice_ticks

SMALL, WIDE = (320, 190), (760, 260)
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 10, 26
_BINS = 100  # points per loss curve
STRIP = (110, 16)


class Dot(NamedTuple):
    """The value of one seed."""

    x: float
    y: float
    text: str


class Mark(NamedTuple):
    """A label below a chart."""

    x: float
    text: str


class ArmCurve(NamedTuple):
    """The curve of one arm: a line through its means, and a dot per seed."""

    name: str
    number: int  # of its colour
    path: str
    dots: list[Dot]
    means: list[str]  # formatted


class ArmChart(NamedTuple):
    """A chart of one metric of all arms."""

    title: str
    note: str
    size: tuple[int, int]
    curves: list[ArmCurve]
    ticks: list[Tick]
    marks: list[Mark]
    axis: str
    summary: str  # text alternative
    border: float | None = None  # x of a vertical line


class Series(NamedTuple):
    """Values of one arm: at each x one per seed."""

    name: str
    number: int
    x: Sequence[float]  # in [0, 1]
    values: Sequence[Sequence[float]]
    apart: int = 0  # leading points that the line leaves out


def number(value: float, unit: str = "") -> str:
    """Format a value with its unit."""
    if not math.isfinite(value):
        return "∞" if value > 0 else "?"
    if unit == "%":
        return f"{100 * value:.1f} %"
    if unit == "dB":
        return f"{value:.2f} dB"
    text = f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"
    return f"{text} {unit}".rstrip()


def bare(value: float, unit: str = "") -> str:
    """Format a value without its unit, which is shown nearby; a share keeps its percent sign."""
    return number(value, unit).removesuffix("" if unit == "%" else f" {unit}")


def mean(values: Sequence[float]) -> float:
    """Return the arithmetic mean."""
    return math.fsum(values) / len(values)


def arm_chart(
    title: str,
    series: Sequence[Series],
    marks: Mapping[float, str],
    *,
    axis: str,
    unit: str = "",
    note: str = "",
    size: tuple[int, int] = SMALL,
    dots: bool = True,
    border: float | None = None,
) -> ArmChart:
    """Chart series on one scale; `marks` are the labels of the x axis, by x in [0, 1]."""
    every = [value for one in series for values in one.values for value in values]
    ticks = nice_ticks(min(every), max(every))
    if unit == "%":
        ticks = [tick for tick in ticks if -1e-9 <= tick <= 1 + 1e-9]
    low, high = min(*every, ticks[0]), max(*every, ticks[-1])
    width, height = size

    def x(value: float) -> float:
        return round(_LEFT + value * (width - _LEFT - _RIGHT), 2)

    def y(value: float) -> float:
        return round(height - _BOTTOM - (value - low) / (high - low) * (height - _TOP - _BOTTOM), 2)

    def text(value: float, at: float) -> str:
        return f"{number(value, unit)}{f' at {marks[at]}' if at in marks else ''}"

    curves = []
    for one in series:
        joined = list(zip(one.x, one.values, strict=True))[one.apart :]
        line = " L".join(f"{x(at)} {y(mean(values))}" for at, values in joined)
        found = [
            Dot(x(at), y(value), f"{one.name}: {text(value, at)}")
            for at, values in zip(one.x, one.values, strict=True)
            for value in values
        ]
        curves.append(
            ArmCurve(one.name, one.number, f"M{line}" if line else "", found if dots else [], _means(one, unit))
        )
    gap = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    return ArmChart(
        title=title,
        note=note,
        size=size,
        curves=curves,
        ticks=[Tick(y(tick), _tick(tick, gap, unit)) for tick in ticks],
        marks=[Mark(x(at), label) for at, label in marks.items()],
        axis=axis,
        summary="; ".join(f"{one.name}: {_summary(one, text)}" for one in series),
        border=None if border is None else x(border),
    )


def _means(series: Series, unit: str) -> list[str]:
    return [number(mean(values), unit) for values in series.values]


def _summary(series: Series, text: Callable[[float, float], str]) -> str:
    """Describe the means in words; for a long curve, the first and the last."""
    texts = [text(mean(values), at) for at, values in zip(series.x, series.values, strict=True)]
    return ", ".join(texts) if len(texts) <= 20 else f"from {texts[0]} to {texts[-1]}"


def _tick(tick: float, gap: float, unit: str) -> str:
    scale, sign = (100, " %") if unit == "%" else (1, "")
    digits = max(0, -math.floor(math.log10(gap * scale) + 1e-9))
    return f"{tick * scale:.{digits}f}{sign}"


def evenly(count: int) -> list[float]:
    """Return the positions of `count` marks in [0, 1], half a gap from either end."""
    return [(i + 0.5) / count for i in range(count)]


# --- the page's charts -----------------------------------------------------------------------------------------------


def quality_charts(results: Results) -> list[ArmChart]:
    """Chart quality against decoding steps, one chart per metric."""
    steps = [step.num_steps for step in results.sample.by_steps]
    places = evenly(len(steps))
    marks = dict(zip(places, map(str, steps), strict=True))

    return [
        arm_chart(
            metric.label if metric.unit in ("", "%") else f"{metric.label}, {metric.unit}",
            [
                Series(name, i, places, [results.values(name, step_column(metric, num_steps)) for num_steps in steps])
                for i, name in enumerate(results.names)
            ],
            marks,
            axis="decoding steps",
            unit=metric.unit if metric.unit == "%" else "",
            note=f"{metric.better} is better",
        )
        for metric in STEP_METRICS
    ]


def agreement_charts(results: Results) -> list[ArmChart]:
    """Chart figure 4a: KL to the final prediction, and top-1 agreement with it, of the truth and of every step."""
    count = len(results.sample.steps) + 1
    places = evenly(count)
    marks = dict(zip(places, ["truth", *map(str, range(1, count))], strict=True))

    def values(name: str, key: str) -> list[list[float]]:
        rows = [[figures.truth, *figures.steps] for figures in (one.figures for one in results.of_arm(name))]
        return [[getattr(row[at], key) for row in rows] for at in range(count)]

    def chart(title: str, key: str, unit: str) -> ArmChart:
        series = [Series(name, i, places, values(name, key), apart=1) for i, name in enumerate(results.names)]
        return arm_chart(title, series, marks, axis="decoding step", unit=unit)

    return [
        chart("KL to the final prediction, nats", "kl", ""),
        chart("Top-1 agreement with the final prediction", "top1", "%"),
    ]


def published_agreement(truth: tuple[float, float], kl: Sequence[float], top1: Sequence[float]) -> list[ArmChart]:
    """Chart figure 4a with the values that the paper reports."""
    places = evenly(len(kl) + 1)
    marks = dict(zip(places, ["truth", *map(str, range(1, len(kl) + 1))], strict=True))

    def chart(title: str, values: Sequence[float], unit: str) -> ArmChart:
        series = Series("paper", 0, places, [[value] for value in values], apart=1)
        return arm_chart(title, [series], marks, axis="decoding step", unit=unit)

    return [
        chart("Published: KL to the final prediction", [truth[0], *kl], ""),
        chart("Published: top-1 agreement with it", [truth[1], *top1], "%"),
    ]


def loss_chart(results: Results) -> ArmChart:
    """Chart the training loss of every arm, the mean over seeds."""
    some = next(iter(results.outcomes.values()))
    total, stages = some.steps, list(some.training.items())
    series = []
    for i, name in enumerate(results.names):
        curves = [thinned(outcome.loss, _BINS) for outcome in results.of_arm(name)]
        length = min(map(len, curves))
        at = [point.step / total for point in curves[0][:length]]
        series.append(Series(name, i, at, [[curve[k].loss for curve in curves] for k in range(length)]))
    first = stages[0][1] if len(stages) > 1 else None
    marks = {0.0: "0", 1.0: f"{total:,}"} | ({first / total: f"{first:,}"} if first else {})
    return arm_chart(
        "Cross-entropy of training batches, nats",
        series,
        marks,
        axis="training step",
        note="mean over seeds; neighbouring logged steps are averaged",
        size=WIDE,
        dots=False,
        border=first / total if first else None,
    )


def strip(values: Sequence[float], low: float, high: float) -> list[Dot]:
    """Place seeds on a line from the smallest to the largest value of a column."""
    span = (high - low) or 1.0
    width, height = STRIP
    return [Dot(round(5 + (v - low) / span * (width - 10), 2), height / 2, number(v)) for v in values]
