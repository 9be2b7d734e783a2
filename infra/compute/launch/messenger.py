"""Carry progress and warnings of a training from its processes to the driver; what other processes load quickly."""

import contextlib
import os
import signal
from collections.abc import Mapping
from typing import NamedTuple

Report = tuple[int, int, Mapping[str, float]]


class News(NamedTuple):
    """What has happened since the driver last asked."""

    reports: list[Report]
    warnings: list[str]


class Messenger:
    """Actor on the driver's machine: brings the first rank's progress and the controller's warnings to the driver."""

    def __init__(self) -> None:
        self._news = News([], [])

    def report(self, done: int, total: int, figures: Mapping[str, float]) -> None:
        """Keep a progress report of the first rank."""
        self._news.reports.append((done, total, figures))

    def warn(self, warning: str) -> None:
        """Keep a warning of the controller's."""
        self._news.warnings.append(warning)

    def take(self) -> News:
        """Return the news since the last call."""
        taken, self._news = self._news, News([], [])
        return taken


def kill_process(node: str, pid: int) -> None:
    """Kill a process of a node, if this is that node."""
    import ray

    if ray.get_runtime_context().get_node_id() == node:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
