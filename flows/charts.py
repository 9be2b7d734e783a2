"""Geometry of the report's drawings: numbers in, SVG coordinates out; the templates draw them."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from flows.report_data import Histogram, Measure, StepMeasures

WIDTH, HEIGHT = 260, 150
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 14, 20, 24


class Point(NamedTuple):
    """A measured point: where it is drawn, and what is written at it."""

    x: float
    y: float
    x_label: str
    text: str


class Tick(NamedTuple):
    """A line of the grid and its label."""

    y: float
    text: str


class LineChart(NamedTuple):
    """One measure against the number of decoding steps."""

    title: str
    better: str
    points: list[Point]
    path: str
    ticks: list[Tick]
    summary: str  # the drawing in words


class Area(NamedTuple):
    """One series of a histogram, as a stepped outline in a box of 100 x 100."""

    name: str
    path: str


def show(measure: Measure, value: float | None = None) -> str:
    """A value as the report prints it: shares in percent, plain numbers to three significant digits."""
    number = measure.value if value is None else value
    if measure.unit == "%":
        return f"{100 * number:.1f} %"
    if measure.unit:
        return f"{number:.2f} {measure.unit}"
    if 0.1 <= abs(number) < 10:
        return f"{number:.3f}"
    return f"{number:.3g}" if abs(number) < 1000 else f"{number:,.0f}"


def step_charts(by_steps: Sequence[StepMeasures]) -> list[LineChart]:
    """A chart of each measure that was taken at every step count; steps are spaced evenly, as powers of two are."""
    labels = [measure.label for measure in by_steps[0].measures] if by_steps else []
    columns = [[m for step in by_steps for m in step.measures if m.label == label] for label in labels]
    steps = [step.num_steps for step in by_steps]
    return [_line_chart(column, steps) for column in columns if len(column) == len(steps)]


def _line_chart(measures: Sequence[Measure], steps: Sequence[int]) -> LineChart:
    values = [measure.value for measure in measures]
    ticks = nice_ticks(min(values), max(values))
    if measures[0].unit == "%":
        ticks = [tick for tick in ticks if -1e-9 <= tick <= 1 + 1e-9]
    low, high = min(*values, ticks[0]), max(*values, ticks[-1])
    inner = WIDTH - _LEFT - _RIGHT

    def y(value: float) -> float:
        return round(HEIGHT - _BOTTOM - (value - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM), 2)

    points = [
        Point(round(_LEFT + inner * (i + 0.5) / len(steps), 2), y(measure.value), str(step), _point_label(measure))
        for i, (step, measure) in enumerate(zip(steps, measures, strict=True))
    ]
    first = measures[0]
    return LineChart(
        title=first.label if first.unit in ("", "%") else f"{first.label}, {first.unit}",
        better=first.better,
        points=points,
        path="M" + " L".join(f"{point.x} {point.y}" for point in points),
        ticks=[Tick(y(tick), _tick_label(first, tick, ticks[1] - ticks[0])) for tick in ticks],
        summary="; ".join(f"{p.text} at {p.x_label} step{'' if p.x_label == '1' else 's'}" for p in points),
    )


def _point_label(measure: Measure) -> str:
    """The value without a unit that the title states."""
    return show(measure).removesuffix(f" {measure.unit}" if measure.unit != "%" else "")


def _tick_label(measure: Measure, tick: float, gap: float) -> str:
    scale, unit = (100, " %") if measure.unit == "%" else (1, "")
    digits = max(0, -math.floor(math.log10(gap * scale) + 1e-9))
    return f"{tick * scale:.{digits}f}{unit}"


def nice_ticks(low: float, high: float, count: int = 3) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from at most `low` to at least `high`."""
    if high - low < 1e-12 * max(1.0, abs(high)):
        pad = abs(high) * 0.01 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    gap = next(step * power for step in (1, 2, 5, 10) if step * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / gap + 1e-9), math.ceil(high / gap - 1e-9)
    return [tick * gap for tick in range(first, last + 1)]


def histogram_areas(histogram: Histogram) -> list[Area]:
    """Each series as a closed, stepped outline; the highest bin of all touches the top."""
    low, span = histogram.edges[0], (histogram.edges[-1] - histogram.edges[0]) or 1.0
    top = max((max(shares) for shares in histogram.series.values()), default=1.0) or 1.0
    xs = [round((edge - low) / span * 100, 3) for edge in histogram.edges]
    areas = []
    for name, shares in histogram.series.items():
        steps = " ".join(f"V{round(100 - share / top * 96, 3)} H{x}" for share, x in zip(shares, xs[1:], strict=True))
        areas.append(Area(name, f"M{xs[0]} 100 {steps} V100 Z"))
    return areas
