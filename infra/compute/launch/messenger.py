"""Carry progress and warnings of a training from its processes to the driver; what other processes load quickly."""

import contextlib
import os
import signal
import time
from collections.abc import Mapping
from typing import NamedTuple

Report = tuple[int, int, Mapping[str, float]]


class News(NamedTuple):
    """What has happened since the driver last asked."""

    reports: list[Report]
    warnings: list[str]
    starting: float = 0.0
    """seconds for which ranks have been starting, if they are."""


class Messenger:
    """Actor on the driver's machine: brings the first rank's progress and the controller's warnings to the driver."""

    def __init__(self) -> None:
        self._news = News([], [])
        self._starting: float | None = None

    def report(self, done: int, total: int, figures: Mapping[str, float]) -> None:
        """Keep a progress report of the first rank."""
        self._news.reports.append((done, total, figures))

    def warn(self, warning: str) -> None:
        """Keep a warning of the controller's."""
        self._news.warnings.append(warning)

    def start(self, is_done: bool) -> None:
        """Keep that ranks begin to start, or have started."""
        self._starting = None if is_done else time.monotonic()

    def take(self) -> News:
        """Return the news since the last call."""
        taken, self._news = self._news, News([], [])
        return taken if self._starting is None else taken._replace(starting=time.monotonic() - self._starting)


def kill_process(node: str, pid: int) -> None:
    """Kill a process of a node, if this is that node."""
    import ray

    if ray.get_runtime_context().get_node_id() == node:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
