"""How long work reports that it advances, without knowing who listens (a terminal, Prefect, nobody)."""

from collections.abc import Mapping
from typing import Protocol


class Progress(Protocol):
    """Called with what is done of a total, and the latest figures (loss, images/s ...)."""

    def __call__(self, done: int, total: int, figures: Mapping[str, float]) -> None:
        """Report `done` of `total` units of work."""


def silent(done: int, total: int, figures: Mapping[str, float]) -> None:
    """Listen to nothing: the default where a library function is called without a flow around it."""
