"""Commands about data: `sftok files`, `sftok verify` and `sftok diff`. What is heavy is imported when one runs."""

import contextlib
import json
from collections.abc import Iterator
from typing import Annotated

import typer

from flows.cli.console import console, logging_on_stderr, stdout_for_results
from flows.cli.exits import Failed, one_line_refusals
from flows.cli.options import JsonOption, RefArgument, StoreOption
from infra.errors import TransientError


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command(epilog=FILES_EXAMPLES)(files)
    app.command(epilog=VERIFY_EXAMPLES)(verify)
    app.command(epilog=DIFF_EXAMPLES)(diff)


FILES_EXAMPLES = """\b
Examples:
  sftok files codes/1f2e --split train
  sftok files codes/1f2e --split val --json
  duckdb -c "select count(*) from read_parquet($(sftok files codes/1f2e --split train --json))"
"""
VERIFY_EXAMPLES = """\b
Examples:
  sftok verify codes/1f2e
  sftok verify codes/1f2e --inputs --workers 16
  sftok verify s3://bucket/prefix/artifacts/images/1f2e3d --json
"""
DIFF_EXAMPLES = """\b
Examples:
  sftok diff codes/1f2e codes/3d4c
  sftok diff tokenizer/1f2e tokenizer/3d4c --worst 50 --json
  sftok diff codes/1f2e codes/3d4c --usage
"""


@contextlib.contextmanager
def _said_on_stderr() -> Iterator[None]:
    """Refusals and failures in one line; nothing but the result on stdout."""
    with stdout_for_results(), logging_on_stderr(verbose=False), one_line_refusals():
        try:
            yield
        except TransientError as error:
            raise Failed(f"{error}; try again") from error


def files(
    ref: RefArgument,
    *,
    split: Annotated[str | None, typer.Option(help="Only the shards of train, val or sample.")] = None,
    store: StoreOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array on stdout.")] = False,
) -> None:
    """List the files of an artifact by their full names, also those that lie in another version's folder."""
    with _said_on_stderr():
        from flows.store.lineage import files_of_artifact

        found = list(files_of_artifact(ref, split=split, store=store))
    for line in [json.dumps(found)] if as_json else found:
        typer.echo(line)


def verify(
    ref: RefArgument,
    *,
    store: StoreOption = None,
    inputs: Annotated[bool, typer.Option("--inputs", help="Go on through all that it was made of.")] = False,
    workers: Annotated[int, typer.Option(min=0, help="Ray workers; 0 works in this process.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Read an artifact again, every byte, and prove its counts. Exit code 1 if something is wrong."""
    with _said_on_stderr():
        from flows.runs.progress import on_stderr
        from flows.store.verify import verify as check

        with on_stderr() as display:
            made = check(
                ref,
                store=store,
                inputs=inputs,
                workers=workers,
                progress=lambda done, total, figures: display.update("verify, MiB", done, total, figures),
            )
            display.end("verify, MiB")
    if as_json:
        typer.echo(json.dumps(made.as_json()))
    else:
        for artifact in made.artifacts:
            for line in artifact.lines():
                typer.echo(line)
    if not made.ok:
        raise typer.Exit(1)


def diff(
    before: Annotated[str, typer.Argument(help="A code dataset, or a tokenizer whose codes are in the store.")],
    after: Annotated[str, typer.Argument(help="The one to compare it with.")],
    *,
    store: StoreOption = None,
    worst: Annotated[int, typer.Option(min=0, help="How many of the least equal images to name.")] = 10,
    usage: Annotated[
        bool, typer.Option("--usage", help="Only usage, entropy and perplexity, for codebooks that differ in size.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Compare the codes of the same images before and after: which are equal, how the codebook's use has moved."""
    with _said_on_stderr():
        from flows.runs.progress import on_stderr
        from flows.store.diff.diff import diff as compare

        with on_stderr() as display:
            made = compare(
                before,
                after,
                store=store,
                worst=worst,
                usage_only=usage,
                progress=lambda done, total, figures: display.update("diff, shards", done, total, figures),
            )
            display.end("diff, shards")
    if as_json:
        typer.echo(json.dumps(made.as_json(), allow_nan=False))
    else:
        console().print(made.as_rich())
