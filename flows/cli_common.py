"""What the parts of the command line share: options, and how a refusal and a failure end it."""

import contextlib
from collections.abc import Iterator
from typing import Annotated

import typer

StoreOption = Annotated[
    str | None, typer.Option(help="Folder or s3://bucket/prefix of the artifacts. [default: $SFTOK_STORE, or ./store]")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


class Refused(typer.TyperException):
    """The user asked for something that cannot be done."""

    exit_code = 2


class Failed(typer.TyperException):
    """It was tried, and did not work."""

    exit_code = 1


@contextlib.contextmanager
def one_line_refusals() -> Iterator[None]:
    """A ValueError before anything has begun is the user's to mend."""
    try:
        yield
    except ValueError as error:
        raise Refused(str(error)) from error
