"""Report an ablation as HTML, Markdown and JSON.

Every sentence is derived from the outcomes; which arm is better is nowhere taken for granted. Published figures are
shown apart, marked as not comparable.
"""

import json
from datetime import UTC, datetime
from typing import NamedTuple

from flows.ablation.charts import (
    STRIP,
    Dot,
    agreement_charts,
    bare,
    loss_chart,
    mean,
    number,
    published_agreement,
    quality_charts,
    strip,
)
from flows.ablation.results import (
    STEP_METRICS,
    Column,
    Results,
    columns,
    headline,
    step_column,
    steps_text,
)
from flows.recipes.ablations import FREE, HELD
from flows.report import published
from flows.report.render import Report, environment, markdown_text
from flows.report.script import SCRIPT, SCRIPT_HASH
from infra.artifacts.made_with import versions
from infra.machine import hardware
from sftok.evaluation.reconstruction import Figure

# Figure 4a of the paper, 8 decoding steps: KL and top-1 of the ground truth, then of the steps 1 to 7.
FIGURE_4A_TRUTH = (10.11, 0.09)
FIGURE_4A_KL = (1.04, 0.85, 0.67, 0.49, 0.32, 0.16, 0.05)
FIGURE_4A_TOP1 = (0.78, 0.77, 0.74, 0.78, 0.85, 0.88, 0.89)
FEW_SEEDS = 3  # below which the page warns that a range over seeds says little


class Facts(NamedTuple):
    """Facts about the run."""

    run: str
    source: str


class Cell(NamedTuple):
    """A metric of an arm: mean and range over seeds, and each seed."""

    mean: float
    low: float
    high: float
    unit: str
    dots: list[Dot]
    summary: str  # text alternative


class Row(NamedTuple):
    """A row of the table: an arm."""

    name: str
    number: int
    steps: int
    cells: list[Cell]


class Versus(NamedTuple):
    """An arm against the reference arm in one metric, seed by seed."""

    arm: str
    column: Column
    differences: list[float]  # the arm's value minus the reference's

    @property
    def better(self) -> int:
        """Count the seeds in which the arm was better than the reference."""
        sign = 1 if self.column.better == "higher" else -1
        return sum(sign * difference > 0 for difference in self.differences)

    @property
    def equal(self) -> int:
        """Count the seeds in which both were equal."""
        return sum(difference == 0 for difference in self.differences)

    @property
    def summary(self) -> str:
        """Describe counts and differences in words."""
        if self.equal == len(self.differences):
            return f"equal in all {self.equal} seed{'' if self.equal == 1 else 's'}"
        return f"{self.counted}; mean difference {self.difference}"

    @property
    def difference(self) -> str:
        """Format the mean difference and, for several seeds, its range, with signs."""
        text = _signed(mean(self.differences), self.column)
        if len(self.differences) > 1:
            low, high = (_signed(end, self.column) for end in (min(self.differences), max(self.differences)))
            text += f" ({low} to {high})"
        return f"{text} {'points' if self.column.unit == '%' else self.column.unit}".rstrip()

    @property
    def counted(self) -> str:
        """Describe in how many seeds it was better, equal and worse."""
        total = len(self.differences)
        worse = total - self.better - self.equal
        parts = [f"better in {self.better} of {total} seed{'' if total == 1 else 's'}"]
        parts += [f"equal in {self.equal}"] if self.equal else []
        parts += [f"worse in {worse}"] if worse else []
        return ", ".join(parts)


def _signed(value: float, column: Column) -> str:
    return f"{100 * value:+.2f}" if column.unit == "%" else f"{value:+.3g}"


def versus(results: Results, column: Column) -> list[Versus]:
    """Compare every other arm with the reference."""
    reference = results.values(results.plan.reference, column)
    return [
        Versus(name, column, [a - b for a, b in zip(results.values(name, column), reference, strict=True)])
        for name in results.names
        if name != results.plan.reference
    ]


def findings(results: Results) -> dict[str, list[str]]:
    """State which arms did better, as sentences by heading: against the reference, and many steps against one."""
    steps, first = headline(results.sample), results.sample.by_steps[0].num_steps
    psnr, _, distance, agreement = STEP_METRICS
    sentences = {
        f"Against {results.plan.reference}": [
            f"{column.label}: {one.arm} was {one.summary}."
            for column in (step_column(psnr, steps), step_column(distance, steps))
            for one in versus(results, column)
        ]
    }
    if first != steps:
        sentences[f"{steps_text(steps).capitalize()} of decoding against {steps_text(first)}"] = [
            f"{metric.label}: {one.arm} was {one.summary}."
            for metric in (psnr, agreement)
            for one in _gains(results, metric, first, steps)
        ]
    return sentences


def _gains(results: Results, metric: Figure, first: int, last: int) -> list[Versus]:
    """Compare every arm at `last` steps with itself at `first`."""
    before, after = step_column(metric, first), step_column(metric, last)
    return [
        Versus(
            name,
            after,
            [b - a for a, b in zip(results.values(name, before), results.values(name, after), strict=True)],
        )
        for name in results.names
    ]


def table(results: Results) -> list[Row]:
    """Make the table of every arm and metric."""
    shown = columns(results.sample)
    ranges = {
        column.key: [value for name in results.names for value in results.values(name, column)] for column in shown
    }

    def cell(name: str, column: Column) -> Cell:
        values, every = results.values(name, column), ranges[column.key]
        summary = ", ".join(
            f"seed {seed}: {number(value, column.unit)}" for seed, value in zip(results.plan.seeds, values, strict=True)
        )
        dots = strip(values, min(every), max(every))
        return Cell(mean(values), min(values), max(values), column.unit, dots, summary)

    return [
        Row(name, i, results.of_arm(name)[0].steps, [cell(name, column) for column in shown])
        for i, name in enumerate(results.names)
    ]


def metrics(results: Results) -> dict[str, float]:
    """Return the means over seeds, by arm and metric."""
    shown = columns(results.sample)
    return {f"{name}: {c.key}": mean(results.values(name, c)) for name in results.names for c in shown}


def build_ablation_report(results: Results, facts: Facts) -> Report:
    """Render an ablation as a self-contained HTML page, Markdown, and JSON."""
    view = _view(results, facts)
    templates = environment()
    templates.filters.update({"md": markdown_text, "number": number, "bare": bare})
    return Report(
        html=templates.get_template("ablation.html.j2").render(view),
        markdown=templates.get_template("ablation.md.j2").render(view),
        json=json.dumps(_as_json(results, facts, view), indent=1, ensure_ascii=False) + "\n",
    )


def _view(results: Results, facts: Facts) -> dict[str, object]:
    shown = columns(results.sample)
    return {
        "plan": results.plan,
        "facts": facts,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "sample": results.sample,
        "outcomes": list(results.outcomes.values()),
        "training": next(iter(results.outcomes.values())).training,
        "columns": shown,
        "rows": table(results),
        "versus": list(zip(*(versus(results, column) for column in shown), strict=True)),
        "findings": findings(results),
        "few_seeds": len(results.plan.seeds) < FEW_SEEDS,
        "headline": steps_text(headline(results.sample)),
        "strip_size": STRIP,
        "quality": quality_charts(results),
        "agreement": agreement_charts(results),
        "figure_4a": published_agreement(FIGURE_4A_TRUTH, FIGURE_4A_KL, FIGURE_4A_TOP1),
        "loss": loss_chart(results),
        "free": FREE,
        "held": HELD,
        "published": published,
        "versions": versions(),
        "hardware": hardware(),
        "script": SCRIPT,
        "script_hash": SCRIPT_HASH,
    }


def _as_json(results: Results, facts: Facts, view: dict[str, object]) -> dict[str, object]:
    plan, shown = results.plan, columns(results.sample)
    return {
        "ablation": plan.name,
        **facts._asdict(),
        "created_at": view["created_at"],
        "seeds": plan.seeds,
        "reference": plan.reference,
        "arms": {
            arm.name: {
                "overrides": arm.overrides,
                "training_steps": results.of_arm(arm.name)[0].training,
                "figures": {
                    column.key: {
                        "mean": mean(values := results.values(arm.name, column)),
                        "low": min(values),
                        "high": max(values),
                        "by_seed": dict(zip(map(str, plan.seeds), values, strict=True)),
                    }
                    for column in shown
                },
            }
            for arm in plan.arms
        },
        "findings": view["findings"],
        "outcomes": [outcome.as_json() for outcome in results.outcomes.values()],
        "published_not_comparable": {
            "source": published.PAPER,
            "conditions": published.CONDITIONS,
            "rfid": {arm.name: arm.published for arm in plan.arms if arm.published},
            "figure_4a": {"truth": FIGURE_4A_TRUTH, "kl": FIGURE_4A_KL, "top1": FIGURE_4A_TOP1},
        },
        "recipe": plan.base.as_json(),
    }
