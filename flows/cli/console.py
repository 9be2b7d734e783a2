"""Route output: results to stdout, everything else to stderr, log lines above the bars instead of across them."""

import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from flows.results.types import Finding
    from flows.runs.progress import Display

ROOMS = ("flows", "sftok", "generator", "infra")


def speak_utf8() -> None:
    """Begin this program again in Python's UTF-8 mode if the locale has another encoding, which misreads file names."""
    if sys.getfilesystemencoding() != "utf-8":
        os.environ["PYTHONUTF8"] = "1"  # of child processes, too
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


class StdoutError(Exception):
    """Standard output cannot be written to. No OSError, which libraries handle in ways of their own."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(cause)
        self.cause = cause


class _Stdout(io.TextIOWrapper):
    """Standard output whose errors cannot be taken for those of other files."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            raise self._give_up(error) from error

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            raise self._give_up(error) from error

    def _give_up(self, error: OSError) -> StdoutError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())  # for what is still flushed at the end
        return StdoutError(error)


class _Stderr(io.TextIOWrapper):
    """Standard error that nobody may read any more: work goes on without a word."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            return super().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()


STREAMS = {"stdout": _Stdout, "stderr": _Stderr}


def prepare_streams() -> None:
    """Let closed standard streams lead nowhere, and show a question mark where stdout cannot show a character."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
        elif type(stream) is io.TextIOWrapper and name in STREAMS:  # not what a test puts in its place
            errors = "replace" if stream.errors == "strict" else stream.errors
            is_flushed = stream.line_buffering or stream.isatty()
            setattr(sys, name, STREAMS[name](stream.buffer, stream.encoding, errors, line_buffering=is_flushed))


@contextlib.contextmanager
def stdout_for_results() -> Iterator[None]:
    """Send to stderr whatever anybody prints in the block, child processes included: stdout is for the result alone."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


@contextlib.contextmanager
def logging_on_stderr(verbose: bool) -> Iterator[None]:
    """Show log lines of our packages on stderr: warnings, and everything if `verbose`; Prefect's API gets them all."""
    handler = _Lines(logging.INFO if verbose else logging.WARNING)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    loggers = [logging.getLogger(room) for room in ROOMS]
    before = [(logger, logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False  # Prefect's root handler would say it again
    try:
        yield
    finally:
        for logger, level, propagate in before:
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate


@contextlib.contextmanager
def log_lines_above(display: "Display") -> Iterator[None]:
    """Show log lines above the bars instead of across them."""
    handlers = [handler for handler in logging.getLogger(ROOMS[0]).handlers if isinstance(handler, _Lines)]
    for handler in handlers:
        handler.display = display
    try:
        yield
    finally:
        for handler in handlers:
            handler.display = None


class _Lines(logging.Handler):
    """Log lines on the run's display, or on stderr while there is none."""

    display: "Display | None" = None

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if self.display is None:
            sys.stderr.write(text + "\n")
        else:
            self.display.line(text)


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on stdout."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(*head, box=SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*(Text(cell, overflow="fold") for cell in row))
    console().print(table)


def print_findings(found: "Sequence[Finding] | None") -> None:
    """Print what to look at first in the figures of a run, or that there is nothing; None: they were not judged."""
    if found is None:
        return
    typer.echo(f"what to look at first: {'' if found else 'nothing; no rule found anything in the figures'}".rstrip())
    for one in found:
        typer.echo(f"  {one.severity}: {one.sentence}\n    {one.facts}")
        for remedy in one.remedies:
            typer.echo(f"    try: {remedy}")


def console() -> "Console":
    """Return the terminal's console; a file has no width to fit, and gets a wide one."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=200)
