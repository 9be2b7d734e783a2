"""Show the progress of stages: bars on a terminal, lines in a pipe, log lines in a deployment, artifacts in Prefect."""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Protocol, TextIO
from uuid import UUID

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from infra.progress import Progress, silent

LINE_SECONDS = 5.0
ARTIFACT_SECONDS = 3.0  # one is a request of about 20 ms in the middle of a training step

log = logging.getLogger(__name__)


class Display(Protocol):
    """Somewhere to show the progress of one run."""

    def update(self, stage: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        """Show that `stage` has done `done` of `total`."""

    def line(self, text: str) -> None:
        """Show a line that stays."""

    def end(self, stage: str) -> None:
        """Take the progress of `stage` away, whichever way it ended."""


class Lines:
    """One line now and then: for pipes and files, and as log lines for deployments."""

    def __init__(self, stream: TextIO | None, *, seconds: float = LINE_SECONDS) -> None:
        """Write to `stream`, or to the log if it is None; at most a line in `seconds` for one stage, and its last."""
        self._stream = stream
        self._seconds = seconds
        self._next: dict[str, float] = {}

    def update(self, stage: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        """Show that `stage` has done `done` of `total`."""
        now = time.monotonic()
        if done < total and now < self._next.get(stage, 0.0):
            return
        self._next[stage] = now + self._seconds
        self.line(format_line(stage, done, total, figures))

    def line(self, text: str) -> None:
        """Show a line."""
        if self._stream is None:
            log.info(text)
        else:
            self._stream.write(text + "\n")
            self._stream.flush()

    def end(self, stage: str) -> None:
        """Forget when the stage's next line is due."""
        self._next.pop(stage, None)


class Bars:
    """A bar for every running stage of a terminal; entering the object starts the drawing."""

    def __init__(self, console: Console) -> None:
        self._bars = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}", style="dim"),
            console=console,
            transient=True,
        )
        self._ids: dict[str, TaskID] = {}

    def __enter__(self) -> "Bars":
        """Start drawing."""
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop drawing and give the terminal back."""
        self._bars.stop()

    def update(self, stage: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        """Show that `stage` has done `done` of `total`."""
        if stage not in self._ids:
            self._ids[stage] = self._bars.add_task(stage, total=total, figures="")
        self._bars.update(self._ids[stage], completed=done, total=total, figures=format_figures(figures))

    def line(self, text: str) -> None:
        """Show a line above the bars."""
        self._bars.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def end(self, stage: str) -> None:
        """Remove the stage's bar."""
        if stage in self._ids:
            self._bars.remove_task(self._ids.pop(stage))


_display: ContextVar[Display | None] = ContextVar("display", default=None)


@contextlib.contextmanager
def on_stderr() -> Iterator[Display]:
    """Show the progress of everything in the block on stderr: bars if it is a terminal, else lines."""
    with contextlib.ExitStack() as stack:
        is_terminal = sys.stderr.isatty()
        shown: Display = stack.enter_context(Bars(Console(stderr=True))) if is_terminal else Lines(sys.stderr)
        token = _display.set(shown)
        try:
            yield shown
        finally:
            _display.reset(token)


def display() -> Display:
    """Return the display in use; the log if none was chosen."""
    return _display.get() or Lines(None, seconds=2 * LINE_SECONDS)


@contextlib.contextmanager
def of_stage(stage: str, watch: Progress = silent) -> Iterator[Progress]:
    """Return the callback that a stage reports progress to: the display, an artifact of its Prefect task, `watch`."""
    shown = display()
    artifact = _Artifact(stage)

    def listen(done: int, total: int, figures: Mapping[str, float]) -> None:
        shown.update(stage, done, total, figures)
        artifact.update(done, total, figures)
        watch(done, total, figures)

    try:
        yield listen
    finally:
        shown.end(stage)


class _Artifact:
    """A progress bar in the Prefect UI; a server that does not take it costs the bar, never the stage."""

    def __init__(self, stage: str) -> None:
        self._key = f"progress-{stage.replace('_', '-')}"
        self._stage = stage
        self._id: UUID | None = None
        self._next = 0.0
        self._given_up = False

    def update(self, done: int, total: int, figures: Mapping[str, float]) -> None:
        now = time.monotonic()
        if self._given_up or (done < total and now < self._next) or not _in_task_run():
            return
        self._next = now + ARTIFACT_SECONDS
        try:
            self._send(100.0 * done / max(total, 1), format_line(self._stage, done, total, figures))
        except httpx.HTTPError as error:
            self._given_up = True
            log.warning("%s: no progress in Prefect any more: %s", self._stage, error)

    def _send(self, percent: float, description: str) -> None:
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        if self._id is None:
            created = create_progress_artifact(percent, key=self._key, description=description)
            assert isinstance(created, UUID)  # it is a coroutine in an async task only
            self._id = created
        else:
            update_progress_artifact(self._id, progress=percent, description=description)


def _in_task_run() -> bool:
    from prefect.context import TaskRunContext

    return TaskRunContext.get() is not None


def format_line(stage: str, done: int, total: int, figures: Mapping[str, float]) -> str:
    """Format how far a stage is, with its latest figures."""
    return f"{stage}: {done}/{total} {format_figures(figures)}".rstrip()


def format_figures(figures: Mapping[str, float]) -> str:
    """Format the latest figures in a few characters each."""
    return " ".join(f"{name}={value:.4g}" for name, value in figures.items())
