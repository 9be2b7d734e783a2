"""Report the progress of long work, whoever listens (a terminal, Prefect, nobody)."""

from collections.abc import Mapping
from typing import Protocol


class Progress(Protocol):
    """Callback that receives the units done, their total, and the latest figures (loss, images/s ...)."""

    def __call__(self, done: int, total: int, figures: Mapping[str, float]) -> None:
        """Report `done` of `total` units of work."""


def silent(done: int, total: int, figures: Mapping[str, float]) -> None:
    """Ignore progress: the default where a library function is called outside a flow."""
