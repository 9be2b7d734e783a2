"""Options that commands share, and the errors that end them with one line."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated, NoReturn

import typer

from infra.errors import TransientError
from infra.store.errors import StoreFullError

TERMINATED = 128 + signal.SIGTERM  # exit code, as a shell tells of it


class DeviceName(StrEnum):
    """Values of --device."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


StoreOption = Annotated[
    str | None, typer.Option(help="Folder or s3://bucket/prefix of the artifacts. [default: $SFTOK_STORE, or ./store]")
]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Show log lines, Prefect's too.")]
DeviceOption = Annotated[
    DeviceName | None,
    typer.Option(
        help="Where to compute: cpu, cuda, or auto: cuda where this machine, or the Ray cluster, has a GPU. Results of "
        "the two have digests of their own. [default: auto]"
    ),
]
AnewOption = Annotated[
    bool,
    typer.Option("--anew", help="Give up unfinished shards that another kind of device began, and begin them anew."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def device_override(device: DeviceName | None) -> list[str]:
    """Return the option --device as a change of a recipe."""
    return [] if device is None else [f"compute.device={device.value}"]


class Refused(typer.TyperException):
    """The user asked for something that cannot be done."""

    exit_code = 2


class Failed(typer.TyperException):
    """It was tried, and did not work."""

    exit_code = 1


@contextlib.contextmanager
def one_line_refusals() -> Iterator[None]:
    """Turn a ValueError before anything has begun into a refusal, and a store that is away or full into a failure."""
    try:
        yield
    except ValueError as error:
        raise Refused(str(error)) from error
    except (TransientError, StoreFullError) as error:
        raise Failed(str(error)) from error


@contextlib.contextmanager
def server_failures() -> Iterator[None]:
    """Turn a Prefect server that does not start or answer into a failure of one line."""
    from flows.prefect_server.temporary import ServerError

    try:
        yield
    except ServerError as error:
        raise Failed(str(error)) from error


def fail_if(error: str | None) -> None:
    """End a command whose run was stopped."""
    if error:
        raise Failed(error)


class _Terminated(BaseException):
    """SIGTERM came."""


@contextlib.contextmanager
def one_line_termination() -> Iterator[None]:
    """End by SIGTERM as by Ctrl-C: what was started is stopped, and one line says how to resume.

    Prefect turns the signal into an exception of its own while a flow runs, and sends it again after the flow: by then
    the record is written, and the system's default would leave the rest to chance.
    """
    if threading.current_thread() is not threading.main_thread():  # of somebody's own program
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    except _Terminated:
        typer.echo("sftok: terminated; the same command resumes from here", err=True)
        raise typer.Exit(TERMINATED) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(*_: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the way out is begun, and is not to be cut short
    raise _Terminated
