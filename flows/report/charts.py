"""Geometry of the report's charts: numbers in, SVG coordinates out; the templates draw them."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from flows.results.types import FinalAgreement, GeneratorFit, LossCurve, StepScores, SweepRow
from sftok.evaluation.results import Histogram, Score

WIDTH, HEIGHT = 260, 150
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 14, 20, 24


class Point(NamedTuple):
    """A data point: its coordinates and labels."""

    x: float
    y: float
    x_label: str
    text: str


class Tick(NamedTuple):
    """A grid line and its label."""

    y: float
    text: str


class LineChart(NamedTuple):
    """One metric against the number of decoding steps."""

    title: str
    better: str
    points: list[Point]
    path: str
    ticks: list[Tick]
    summary: str  # text alternative


class Curve(NamedTuple):
    """A curve of a chart of several."""

    name: str
    path: str
    points: list[Point]


class SweepChart(NamedTuple):
    """Class accuracy of one generator's samples against guidance, one curve per temperature."""

    generator: str
    seconds: str  # sampling time per image, in words; empty if unknown
    curves: list[Curve]
    ticks: list[Tick]
    summary: str  # text alternative


class FitChart(NamedTuple):
    """Held-out NLL per token by position, in nats: of the generator and of the unigram baseline."""

    curves: list[Curve]
    ticks: list[Tick]
    marks: list[Point]  # the first and the last position
    summary: str  # text alternative


class Area(NamedTuple):
    """One series of a histogram, as a stepped outline in a 100 x 100 box."""

    name: str
    path: str


def show(score: Score, value: float | None = None) -> str:
    """Format a value for the report: shares in percent, plain numbers to three significant digits."""
    number = score.value if value is None else value
    if score.unit == "%":
        return f"{100 * number:.1f} %"
    if score.unit:
        return f"{number:.2f} {score.unit}"
    if 0.1 <= abs(number) < 10:
        return f"{number:.3f}"
    return f"{number:.3g}" if abs(number) < 1000 else f"{number:,.0f}"


def step_charts(by_steps: Sequence[StepScores]) -> list[LineChart]:
    """Chart each metric that has a score at every number of steps; steps are evenly spaced, as powers of two are."""
    labels = [score.label for score in by_steps[0].measures] if by_steps else []
    columns = [[m for step in by_steps for m in step.measures if m.label == label] for label in labels]
    steps = [step.num_steps for step in by_steps]
    return [_line_chart(column, steps) for column in columns if len(column) == len(steps)]


def _line_chart(scores: Sequence[Score], steps: Sequence[int]) -> LineChart:
    values = [score.value for score in scores]
    ticks = nice_ticks(min(values), max(values))
    if scores[0].unit == "%":
        ticks = [tick for tick in ticks if -1e-9 <= tick <= 1 + 1e-9]
    low, high = min(*values, ticks[0]), max(*values, ticks[-1])
    inner = WIDTH - _LEFT - _RIGHT

    def y(value: float) -> float:
        return round(HEIGHT - _BOTTOM - (value - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM), 2)

    points = [
        Point(round(_LEFT + inner * (i + 0.5) / len(steps), 2), y(score.value), str(step), _point_label(score))
        for i, (step, score) in enumerate(zip(steps, scores, strict=True))
    ]
    first = scores[0]
    return LineChart(
        title=first.label if first.unit in ("", "%") else f"{first.label}, {first.unit}",
        better=first.better,
        points=points,
        path="M" + " L".join(f"{point.x} {point.y}" for point in points),
        ticks=[Tick(y(tick), _tick_label(first, tick, ticks[1] - ticks[0])) for tick in ticks],
        summary="; ".join(f"{p.text} at {p.x_label} step{'' if p.x_label == '1' else 's'}" for p in points),
    )


def agreement_charts(found: FinalAgreement) -> list[LineChart]:
    """Chart the steps before the last: divergence from its prediction, and share of equal codes."""
    return [
        _over_steps("KL to the final prediction, nats", found.kl, "truth {:.2f}", "{:.2f}", low=0.0),
        _over_steps(
            "Same most likely code as the final prediction", found.top1, "truth {:.0%}", "{:.0%}", low=0.0, high=1.0
        ),
    ]


def _over_steps(
    title: str, values: Sequence[float], truth: str, text: str, *, low: float, high: float | None = None
) -> LineChart:
    steps = values[1:]
    ticks = [tick for tick in nice_ticks(low, high or max(*steps, low + 1e-9)) if tick >= low]
    top, inner = max(ticks[-1], *steps), WIDTH - _LEFT - _RIGHT

    def y(value: float) -> float:
        return round(HEIGHT - _BOTTOM - (value - low) / (top - low) * (HEIGHT - _TOP - _BOTTOM), 2)

    points = [
        Point(round(_LEFT + inner * (at + 0.5) / len(steps), 2), y(value), str(at + 1), text.format(value))
        for at, value in enumerate(steps)
    ]
    return LineChart(
        title=title,
        better=truth.format(values[0]),
        points=points,
        path="M" + " L".join(f"{point.x} {point.y}" for point in points),
        ticks=[Tick(y(tick), text.format(tick)) for tick in ticks],
        summary="; ".join([truth.format(values[0]), *(f"{point.text} at step {point.x_label}" for point in points)]),
    )


def loss_charts(curves: Sequence[LossCurve]) -> list[LineChart]:
    """Chart each training's loss, on a logarithmic scale if it falls by more than ten times."""
    return [_loss_chart(curve) for curve in curves if len(curve.steps) > 1]


def _loss_chart(curve: LossCurve) -> LineChart:
    is_log = min(curve.losses) > 0 and max(curve.losses) > 10 * min(curve.losses)
    values = [math.log10(loss) if is_log else loss for loss in curve.losses]
    low, high = min(values), max(values)
    span, steps = (high - low) or 1.0, curve.steps[-1] - curve.steps[0]

    def y(value: float) -> float:
        return round(HEIGHT - _BOTTOM - (value - low) / span * (HEIGHT - _TOP - _BOTTOM), 2)

    points = [
        Point(round(_LEFT + (WIDTH - _LEFT - _RIGHT) * (step - curve.steps[0]) / steps, 2), y(value), f"{step:,}", "")
        for step, value in zip(curve.steps, values, strict=True)
    ]
    marks = [Tick(y(value), f"{10**value if is_log else value:.3g}") for value in (low, (low + high) / 2, high)]
    return LineChart(
        title=f"{curve.stage}{' (logarithmic)' if is_log else ''}",
        better="",
        points=[points[0], points[-1]],
        path="M" + " L".join(f"{point.x:g} {point.y:g}" for point in points),
        ticks=marks,
        summary=f"{curve.losses[0]:.3g} at step {curve.steps[0]:,}, {curve.losses[-1]:.3g} at step {curve.steps[-1]:,}",
    )


def fit_chart(fit: GeneratorFit) -> FitChart:
    """Chart the generator's NLL and the baseline's over the positions of a sequence, counted from 1."""
    lines = {"generator": fit.by_position, "unigram baseline": fit.frequency_by_position}
    values = [value for line in lines.values() for value in line]
    ticks = nice_ticks(min(values), max(values))
    low, high = min(*values, ticks[0]), max(*values, ticks[-1])
    inner, width = WIDTH - _LEFT - _RIGHT, max(fit.positions[-1] - fit.positions[0], 1)

    def y(value: float) -> float:
        return round(HEIGHT - _BOTTOM - (value - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM), 2)

    def curve(name: str, line: Sequence[float]) -> Curve:
        points = [
            Point(
                round(_LEFT + inner * (place - fit.positions[0]) / width, 2), y(value), str(place + 1), f"{value:.2f}"
            )
            for place, value in zip(fit.positions, line, strict=True)
        ]
        return Curve(name, "M" + " L".join(f"{point.x:g} {point.y:g}" for point in points), points)

    curves = [curve(name, line) for name, line in lines.items()]
    ends = [curves[0].points[0], curves[0].points[-1]]
    return FitChart(
        curves=curves,
        ticks=[Tick(y(tick), f"{tick:g}") for tick in ticks],
        marks=ends if len(fit.positions) > 1 else ends[:1],
        summary="; ".join(
            f"{c.name}: {c.points[0].text} at the first position, {c.points[-1].text} at the last" for c in curves
        ),
    )


def sweep_charts(rows: Sequence[SweepRow]) -> list[SweepChart]:
    """Chart each generator, all on one scale, so that they can be compared side by side."""
    if not rows:
        return []
    ticks = [tick for tick in nice_ticks(min(row.class_accuracy for row in rows), 1.0) if tick <= 1 + 1e-9]
    scales = sorted({row.cfg_scale for row in rows})
    return [
        _sweep_chart([row for row in rows if row.generator == name], scales, ticks)
        for name in dict.fromkeys(row.generator for row in rows)
    ]


def _sweep_chart(rows: Sequence[SweepRow], scales: Sequence[float], ticks: Sequence[float]) -> SweepChart:
    inner, low, high = WIDTH - _LEFT - _RIGHT, ticks[0], max(ticks[-1], 1.0)

    def y(value: float) -> float:
        return round(HEIGHT - _BOTTOM - (value - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM), 2)

    def curve(temperature: float) -> Curve:
        points = [
            Point(
                round(_LEFT + inner * (scales.index(row.cfg_scale) + 0.5) / len(scales), 2),
                y(row.class_accuracy),
                f"{row.cfg_scale:g}",
                f"{100 * row.class_accuracy:.1f} %",
            )
            for row in sorted(rows, key=lambda row: row.cfg_scale)
            if row.temperature == temperature
        ]
        path = "M" + " L".join(f"{point.x} {point.y}" for point in points)
        return Curve(f"temperature {temperature:g}", path, points)

    curves = [curve(temperature) for temperature in dict.fromkeys(row.temperature for row in rows)]
    gap = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    digits = max(0, -math.floor(math.log10(gap * 100) + 1e-9))
    return SweepChart(
        generator=rows[0].generator,
        seconds=_sampling_time(rows),
        curves=curves,
        ticks=[Tick(y(tick), f"{100 * tick:.{digits}f} %") for tick in ticks],
        summary="; ".join(f"{c.name}: {', '.join(f'{p.text} at {p.x_label}' for p in c.points)}" for c in curves),
    )


def _sampling_time(rows: Sequence[SweepRow]) -> str:
    """Format milliseconds per image without and with guidance, of the fastest (least disturbed) setting."""
    found = []
    for word, is_guided in (("without guidance", False), ("with", True)):
        taken = [
            row.seconds_per_image
            for row in rows
            if row.seconds_per_image is not None and (row.cfg_scale != 1) == is_guided
        ]
        if taken:
            found.append(f"{1000 * min(taken):.2g} ms per image {word}")
    return ", ".join(found)


def _point_label(score: Score) -> str:
    """Format a value without the unit, which the title states."""
    return show(score).removesuffix(f" {score.unit}" if score.unit != "%" else "")


def _tick_label(score: Score, tick: float, gap: float) -> str:
    scale, unit = (100, " %") if score.unit == "%" else (1, "")
    digits = max(0, -math.floor(math.log10(gap * scale) + 1e-9))
    return f"{tick * scale:.{digits}f}{unit}"


def nice_ticks(low: float, high: float, count: int = 3) -> list[float]:
    """Return round numbers (1, 2 or 5 times a power of ten apart) from at most `low` to at least `high`."""
    if high - low < 1e-12 * max(1.0, abs(high)):
        pad = abs(high) * 0.01 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    gap = next(step * power for step in (1, 2, 5, 10) if step * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / gap + 1e-9), math.ceil(high / gap - 1e-9)
    return [tick * gap for tick in range(first, last + 1)]


def histogram_areas(histogram: Histogram) -> list[Area]:
    """Outline each series as a closed, stepped path, scaled so that the highest bin of all almost touches the top."""
    low, span = histogram.edges[0], (histogram.edges[-1] - histogram.edges[0]) or 1.0
    top = max((max(shares) for shares in histogram.series.values()), default=1.0) or 1.0
    xs = [round((edge - low) / span * 100, 3) for edge in histogram.edges]
    areas = []
    for name, shares in histogram.series.items():
        steps = " ".join(f"V{round(100 - share / top * 96, 3)} H{x}" for share, x in zip(shares, xs[1:], strict=True))
        areas.append(Area(name, f"M{xs[0]} 100 {steps} V100 Z"))
    return areas
