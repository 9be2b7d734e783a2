"""Route output: results to stdout, everything else to stderr, log lines above the bars instead of across them."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from flows.runs.progress import Display

ROOMS = ("flows", "sftok", "generator", "infra")


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


def console() -> "Console":
    """Return the terminal's console; a file has no width to fit, and gets a wide one."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=200)
