"""The page of an ablation: what its numbers say and nothing beyond, as HTML, as Markdown and as JSON.

Every sentence is counted from the outcomes; which arm is better is nowhere taken for granted. Published figures stand
apart, marked as not comparable.
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
    Metric,
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
from infra.provenance import hardware, versions

# Figure 4a of the paper, 8 decoding steps: KL and top-1 of the ground truth, then of the steps 1 to 7.
FIGURE_4A_TRUTH = (10.11, 0.09)
FIGURE_4A_KL = (1.04, 0.85, 0.67, 0.49, 0.32, 0.16, 0.05)
FIGURE_4A_TOP1 = (0.78, 0.77, 0.74, 0.78, 0.85, 0.88, 0.89)
FEW_SEEDS = 3  # below which the page says that a range over seeds says little


class Facts(NamedTuple):
    """What the page says of the run."""

    run: str
    source: str


class Cell(NamedTuple):
    """A figure of an arm: its mean over seeds, the range, and each seed."""

    mean: float
    low: float
    high: float
    unit: str
    dots: list[Dot]
    told: str


class Row(NamedTuple):
    """An arm of the table."""

    name: str
    number: int
    steps: int
    cells: list[Cell]


class Versus(NamedTuple):
    """An arm against the reference arm, seed by seed, in one figure."""

    arm: str
    column: Column
    differences: list[float]  # the arm's value minus the reference's

    @property
    def better(self) -> int:
        """Seeds in which the arm was better than the reference."""
        sign = 1 if self.column.better == "higher" else -1
        return sum(sign * difference > 0 for difference in self.differences)

    @property
    def equal(self) -> int:
        """Seeds in which both were the same."""
        return sum(difference == 0 for difference in self.differences)

    @property
    def told(self) -> str:
        """Counts and differences, in words."""
        if self.equal == len(self.differences):
            return f"equal in all {self.equal} seed{'' if self.equal == 1 else 's'}"
        return f"{self.counted}; mean difference {self.difference}"

    @property
    def difference(self) -> str:
        """The mean difference and, of several seeds, its range, with their signs."""
        told = _signed(mean(self.differences), self.column)
        if len(self.differences) > 1:
            low, high = (_signed(end, self.column) for end in (min(self.differences), max(self.differences)))
            told += f" ({low} to {high})"
        return f"{told} {'points' if self.column.unit == '%' else self.column.unit}".rstrip()

    @property
    def counted(self) -> str:
        """In how many seeds it was better; what is left were worse."""
        total = len(self.differences)
        worse = total - self.better - self.equal
        parts = [f"better in {self.better} of {total} seed{'' if total == 1 else 's'}"]
        parts += [f"equal in {self.equal}"] if self.equal else []
        parts += [f"worse in {worse}"] if worse else []
        return ", ".join(parts)


def _signed(value: float, column: Column) -> str:
    return f"{100 * value:+.2f}" if column.unit == "%" else f"{value:+.3g}"


def versus(results: Results, column: Column) -> list[Versus]:
    """Every other arm against the reference."""
    reference = results.values(results.plan.reference, column)
    return [
        Versus(name, column, [a - b for a, b in zip(results.values(name, column), reference, strict=True)])
        for name in results.names
        if name != results.plan.reference
    ]


def findings(results: Results) -> dict[str, list[str]]:
    """What was better where, counted, by what is compared: arms with the reference, and many steps with one."""
    steps, first = headline(results.sample), results.sample.by_steps[0].num_steps
    psnr, _, distance, agreement = STEP_METRICS
    told = {
        f"Against {results.plan.reference}": [
            f"{column.label}: {one.arm} was {one.told}."
            for column in (step_column(psnr, steps), step_column(distance, steps))
            for one in versus(results, column)
        ]
    }
    if first != steps:
        told[f"{steps_text(steps).capitalize()} of decoding against {steps_text(first)}"] = [
            f"{metric.label}: {one.arm} was {one.told}."
            for metric in (psnr, agreement)
            for one in _gains(results, metric, first, steps)
        ]
    return told


def _gains(results: Results, metric: Metric, first: int, last: int) -> list[Versus]:
    """Every arm at `last` steps against itself at `first`."""
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
    """Every arm with every figure."""
    shown = columns(results.sample)
    ranges = {
        column.key: [value for name in results.names for value in results.values(name, column)] for column in shown
    }

    def cell(name: str, column: Column) -> Cell:
        values, every = results.values(name, column), ranges[column.key]
        told = ", ".join(
            f"seed {seed}: {number(value, column.unit)}" for seed, value in zip(results.plan.seeds, values, strict=True)
        )
        dots = strip(values, min(every), max(every))
        return Cell(mean(values), min(values), max(values), column.unit, dots, told)

    return [
        Row(name, i, results.of_arm(name)[0].steps, [cell(name, column) for column in shown])
        for i, name in enumerate(results.names)
    ]


def metrics(results: Results) -> dict[str, float]:
    """The means over seeds, by arm and figure."""
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
