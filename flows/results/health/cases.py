"""What a rule finds, before it is put into the words of a report."""

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from flows.results.types import Evidence

GENERATORS = ("train_generator", "train_second_generator")

Limits = Mapping[str, float]


class Case(NamedTuple):
    """What a rule found."""

    sentence: str
    evidence: tuple[Evidence, ...]
    stage: str = ""
    """the training that it is about; empty: the run."""
    longer: tuple[str, ...] = ()
    """trainings that more steps may help."""
    best: int = 0
    """step of the best validation."""


def facts(unit: Literal["", "dB", "nats", "%", "codes"], values: Mapping[str, float]) -> tuple[Evidence, ...]:
    """Return figures of one unit, by label, as evidence."""
    return tuple(Evidence(label=label, value=value, unit=unit) for label, value in values.items())


def share(value: float) -> str:
    """Format a share for a sentence."""
    return f"{100 * value:.3g} %"


def listed(names: Iterable[str]) -> str:
    """List names in a sentence."""
    *some, last = names
    return f"{', '.join(some)} and {last}" if some else last
