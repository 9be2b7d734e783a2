"""End commands: exit codes, and one line of error instead of a traceback.

0: done. 1: tried, and did not work. 2: refused before work began. 3: the regression gate failed. 129: the terminal was
closed. 130: interrupted. 141: the reader of a pipe has closed it. 143: terminated.
"""

import contextlib
import os
import re
import signal
import threading
from collections.abc import Iterator
from typing import NoReturn

import typer

from infra.errors import TransientError
from infra.store.errors import StoreFullError

FAILED = 1
REFUSED = 2
GATE_FAILED = 3
HUNG_UP = 128 + signal.SIGHUP  # as a shell reports it
INTERRUPTED = 128 + signal.SIGINT
PIPE_CLOSED = 128 + signal.SIGPIPE
TERMINATED = 128 + signal.SIGTERM

MAX_ERROR = 400  # characters
MAX_WORD = 60  # of an error that is longer


class Refused(typer.TyperException):
    """The user asked for something that cannot be done."""

    exit_code = REFUSED


class Failed(typer.TyperException):
    """It was tried, and did not work."""

    exit_code = FAILED


class _Terminated(BaseException):
    """SIGTERM came."""


@contextlib.contextmanager
def one_line_refusals() -> Iterator[None]:
    """Turn a ValueError before anything has begun into a refusal, and a store that is away or full into a failure."""
    try:
        yield
    except ValueError as error:
        raise Refused(str(error)) from error
    except (TransientError, StoreFullError) as error:
        raise Failed(str(error)) from error


def raise_if_stopped(error: BaseException | None) -> None:
    """Raise Ctrl-C or SIGTERM again of which pydantic made an error of its own, whose text alone may tell."""
    while error is not None:
        text = str(error) if type(error).__name__ in ("PydanticSerializationError", "SchemaError") else ""
        for stop in (KeyboardInterrupt, _Terminated):
            if isinstance(error, stop) or re.search(rf"\b{stop.__name__}\b", text):
                raise stop from error
        error = error.__cause__ or error.__context__


@contextlib.contextmanager
def signals_as_themselves() -> Iterator[None]:
    """Raise Ctrl-C or SIGTERM instead of an error that was made of it."""
    try:
        yield
    except Exception as error:
        raise_if_stopped(error)
        raise


def one_line(message: str, length: int = MAX_ERROR) -> str:
    """Return an error as one line of `length` characters at most: what was typed may be of any length.

    Long words are cut in their middle, the longest first, and then the line is.
    """
    words = message.split()
    while len(line := " ".join(words)) > length and len(longest := max(words, key=len)) > MAX_WORD:
        words[words.index(longest)] = _cut(longest, max(len(longest) + length - len(line), MAX_WORD))
    return _cut(line, length)


def _cut(text: str, length: int) -> str:
    if len(text) <= length:
        return text
    head = length * 2 // 3
    return f"{text[:head]}…{text[len(text) - (length - head - 1) :]}"


def check_folder() -> None:
    """Refuse to work in a folder that has been deleted, where libraries fail in ways of their own."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise Refused("the current folder has been deleted; change to one that exists") from None


def end_by(error: OSError, file: str | None) -> int:
    """Say in one line what the machine did not do, and return the exit code."""
    trouble = error.strerror or str(error)
    typer.echo(f"sftok: {one_line(f'{file}: {trouble}' if file else trouble)}", err=True)
    return FAILED


@contextlib.contextmanager
def server_failures() -> Iterator[None]:
    """Turn a Prefect server that does not start, or fails, into a failure of one line."""
    import httpx

    from flows.prefect_server.temporary import ServerError

    try:
        yield
    except ServerError as error:
        raise Failed(_space_or(str(error))) from error
    except httpx.HTTPError as error:
        raise Failed(_space_or(f"the Prefect server failed: {error}; the same command resumes from here")) from error


def _space_or(trouble: str) -> str:
    """Return what is wrong with a server's home, if anything is: a server without space cannot say so itself."""
    from flows.requests.checks import check_home
    from infra.settings import Settings

    try:
        check_home(Settings().home)
    except ValueError as error:
        return str(error)
    return trouble


def fail_if(error: str | None) -> None:
    """End a command whose run was stopped."""
    if error:
        raise Failed(error)


@contextlib.contextmanager
def one_line_termination() -> Iterator[None]:
    """End by SIGTERM, or by a closed terminal, as by Ctrl-C: what was started is stopped; one line says how to resume.

    Prefect turns the signal into an exception of its own while a flow runs, and sends it again after the flow: by then
    the record is written, and the system's default would leave the rest to chance.
    """
    if threading.current_thread() is not threading.main_thread():  # of somebody's own program
        yield
        return
    hung_up: list[int] = []

    def hang_up(number: int, _: object) -> None:
        """End as by SIGTERM, which Prefect and Ray know."""
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        hung_up.append(number)
        os.kill(os.getpid(), signal.SIGTERM)

    is_nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    on_hangup = signal.SIG_IGN if is_nohup else hang_up
    before = signal.signal(signal.SIGTERM, _terminate), signal.signal(signal.SIGHUP, on_hangup)
    try:
        with signals_as_themselves():
            yield
    except _Terminated:
        with contextlib.suppress(OSError):  # the terminal may be gone
            typer.echo("sftok: terminated; the same command resumes from here", err=True)
        raise typer.Exit(HUNG_UP if hung_up else TERMINATED) from None
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGHUP, before[1])


def _terminate(*_: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the way out is begun, and is not to be cut short
    raise _Terminated
