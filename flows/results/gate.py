"""The regression gate: what may become worse by how much, held against the last good run."""

import fnmatch
from typing import NamedTuple

from pydantic import Field, field_validator

from flows.results.comparison import Comparison, FigureChange, GateResult
from infra.config import Config


class Threshold(NamedTuple):
    """How much worse a figure may become; a change within its interval is never a loss."""

    metric: str
    """name of a figure, or a pattern: reconstruction.psnr@*"""
    max_loss: float
    """in the figure's unit; of shares, 0.01 is one point."""

    @classmethod
    def parse(cls, text: str) -> "Threshold":
        """A threshold as it is written: FIGURE=LOSS.

        Raises:
            ValueError: it is written otherwise, or the loss is negative.
        """
        metric, _, loss = text.rpartition("=")
        try:
            found = cls(metric.strip(), float(loss))
        except ValueError as error:
            raise ValueError(f"threshold {text!r}: write FIGURE=LOSS, such as reconstruction.psnr@8=0.5") from error
        if not found.metric or not found.max_loss >= 0:
            raise ValueError(f"threshold {text!r}: write FIGURE=LOSS, such as reconstruction.psnr@8=0.5")
        return found


class GateConfig(Config):
    """What the gate holds a run to; empty lets everything pass."""

    thresholds: tuple[str, ...] = Field(
        (), description="FIGURE=LOSS, how much worse it may become; a figure is held to the first one that names it"
    )

    @field_validator("thresholds")
    @classmethod
    def _can_be_read(cls, thresholds: tuple[str, ...]) -> tuple[str, ...]:
        for text in thresholds:
            Threshold.parse(text)
        return thresholds


class Loss(NamedTuple):
    """A figure that became worse than it may."""

    figure: FigureChange
    threshold: Threshold

    def __str__(self) -> str:
        figure, allowed = self.figure, max(self.threshold.max_loss, self.figure.noise)
        return (
            f"{figure.name} is {figure.value:.5g}, it was {figure.other:.5g}: worse by {abs(figure.change):.3g}, "
            f"and {allowed:.3g} is allowed"
        )


class Judgement(NamedTuple):
    """What the gate says of a run."""

    losses: tuple[Loss, ...]
    held: int
    """figures that were held to a threshold."""
    skipped: tuple[str, ...]
    """figures with a threshold that cannot be compared, and why."""

    @property
    def is_passed(self) -> bool:
        """Whether nothing became worse than it may."""
        return not self.losses

    def result(self, against: str) -> GateResult:
        """The same in words, for a page."""
        losses = tuple(map(str, self.losses))
        return GateResult(against=against, passed=self.is_passed, held=self.held, losses=losses, skipped=self.skipped)


def judge(comparison: Comparison, config: GateConfig) -> Judgement:
    """Hold a run against another one.

    Raises:
        ValueError: a threshold names no figure of the run.
    """
    names = [row.name for row in comparison.rows] + list(comparison.only_now)
    thresholds = [Threshold.parse(text) for text in config.thresholds]
    for threshold in thresholds:
        if not fnmatch.filter(names, threshold.metric):
            raise ValueError(
                f"gate: threshold {threshold.metric!r} names no figure of {comparison.run}; there are "
                f"{', '.join(sorted(names)[:5])} ..."
            )
    losses, held, skipped = [], 0, []
    for row in comparison.rows:
        found = next((t for t in thresholds if fnmatch.fnmatchcase(row.name, t.metric)), None)
        if found is None:
            continue
        if row.why_not:
            skipped.append(f"{row.name}: {row.why_not}")
            continue
        held += 1
        if row.verdict == "worse" and abs(row.change) > found.max_loss:
            losses.append(Loss(row, found))
    return Judgement(tuple(losses), held, tuple(skipped))
