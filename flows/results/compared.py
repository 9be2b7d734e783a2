"""What a comparison of two runs found, as frozen data for pages and for the gate."""

from typing import Literal

from pydantic import Field, FiniteFloat

from infra.config import Config

Verdict = Literal["better", "worse", "same", "changed"]


class Compared(Config):
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
    rows: tuple[Compared, ...]
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
