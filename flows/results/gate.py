"""The regression gate: how much worse than the last good run each score may be."""

import fnmatch
from collections.abc import Sequence
from typing import NamedTuple

from pydantic import Field, field_validator

from flows.results.comparison import Comparison, FigureChange, GateResult
from infra.config import Config


class GateFailedError(RuntimeError):
    """A figure became worse than it may; the report is published nevertheless."""

    def __init__(self, run: str, losses: Sequence[str]) -> None:
        super().__init__(f"the gate is failed by run {run}: {'; '.join(losses)}")


class Threshold(NamedTuple):
    """Threshold on the loss of a score; a change within its interval is never a loss."""

    metric: str
    """name of a metric, or a pattern: reconstruction.psnr@*"""
    max_loss: float
    """in the metric's unit; for shares, 0.01 is one percentage point."""

    @classmethod
    def parse(cls, text: str) -> "Threshold":
        """Parse a threshold, METRIC=LOSS.

        Raises:
            ValueError: it has another form, or the loss is negative.
        """
        metric, _, loss = text.rpartition("=")
        try:
            found = cls(metric.strip(), float(loss))
        except ValueError as error:
            raise ValueError(f"threshold {text!r}: write METRIC=LOSS, such as reconstruction.psnr@8=0.5") from error
        if not found.metric or not found.max_loss >= 0:
            raise ValueError(f"threshold {text!r}: write METRIC=LOSS, such as reconstruction.psnr@8=0.5")
        return found


class GateConfig(Config):
    """Configuration of the gate; without thresholds everything passes."""

    thresholds: tuple[str, ...] = Field(
        (), description="METRIC=LOSS, how much worse it may become; the first one that matches a metric applies"
    )

    @field_validator("thresholds")
    @classmethod
    def _can_be_read(cls, thresholds: tuple[str, ...]) -> tuple[str, ...]:
        for text in thresholds:
            Threshold.parse(text)
        return thresholds


class Loss(NamedTuple):
    """A score that became worse than allowed."""

    figure: FigureChange
    threshold: Threshold

    def __str__(self) -> str:
        figure, allowed = self.figure, max(self.threshold.max_loss, self.figure.noise)
        return (
            f"{figure.name} is {figure.value:.5g}, it was {figure.other:.5g}: worse by {abs(figure.change):.3g}, "
            f"and {allowed:.3g} is allowed"
        )


class Judgement(NamedTuple):
    """The gate's verdict, with the losses as objects."""

    losses: tuple[Loss, ...]
    held: int
    """scores that were checked against a threshold."""
    skipped: tuple[str, ...]
    """scores with a threshold that are not comparable, and why."""

    @property
    def is_passed(self) -> bool:
        """Return whether no score became worse than allowed."""
        return not self.losses

    def result(self, against: str) -> GateResult:
        """Return the verdict in words, for a page."""
        losses = tuple(map(str, self.losses))
        return GateResult(against=against, passed=self.is_passed, held=self.held, losses=losses, skipped=self.skipped)


def judge(comparison: Comparison, config: GateConfig) -> Judgement:
    """Check the scores of a run against thresholds of loss.

    Raises:
        ValueError: a threshold matches no metric of the run.
    """
    names = [row.name for row in comparison.rows] + list(comparison.only_now)
    thresholds = [Threshold.parse(text) for text in config.thresholds]
    for threshold in thresholds:
        if not fnmatch.filter(names, threshold.metric):
            raise ValueError(
                f"gate: threshold {threshold.metric!r} matches no metric of {comparison.run}; there are "
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
