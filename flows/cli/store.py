"""Commands about the store: `sftok ls`, `cp`, `gc`, `pin`, `unpin`, `openlineage`; each imports what it needs."""

import functools
import json
import re
from datetime import timedelta
from typing import Annotated

import typer

from flows.cli.console import logging_on_stderr, stdout_for_results
from flows.cli.exits import one_line_refusals
from flows.cli.options import JsonOption, RefArgument, StoreOption

LS_EXAMPLES = """\b
Examples:
  sftok ls
  sftok ls --kind tokenizer
  sftok ls --run 20261125-014226-digits-dc1e --json
"""
CP_EXAMPLES = """\b
Examples:
  sftok cp tokenizer/1f2e s3://bucket/prefix
  sftok cp report/3d4c ~/mirror --inputs --store s3://bucket/prefix
"""
GC_EXAMPLES = """\b
Examples:
  sftok gc --dry-run
  sftok gc --keep-last 3 --older-than 30d
  sftok gc --older-than 12h --grace 1d --store s3://bucket/prefix --json
"""
PIN_EXAMPLES = """\b
Examples:
  sftok pin tokenizer/1f2e --reason "in the paper"
  sftok pin 1f2e3d --store s3://bucket/prefix
"""
UNPIN_EXAMPLES = """\b
Examples:
  sftok unpin tokenizer/1f2e
"""

OPENLINEAGE_EXAMPLES = """\b
Examples:
  sftok openlineage 20261125-014226-digits-dc1e
  sftok openlineage 20261125-014226-digits-dc1e | curl -d @- http://catalogue/api/v1/lineage/batch
"""


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command("ls", epilog=LS_EXAMPLES)(ls)
    app.command(epilog=CP_EXAMPLES)(cp)
    app.command(epilog=GC_EXAMPLES)(gc)
    app.command(epilog=PIN_EXAMPLES)(pin)
    app.command(epilog=UNPIN_EXAMPLES)(unpin)
    app.command(epilog=OPENLINEAGE_EXAMPLES)(openlineage)


def ls(
    *,
    kind: Annotated[str | None, typer.Option(help="Only artifacts of this kind: images, tokenizer, codes ...")] = None,
    run: Annotated[str | None, typer.Option(help="Only what this run made or found made.")] = None,
    store: StoreOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array on stdout.")] = False,
) -> None:
    """List the finished artifacts of a store."""
    with stdout_for_results(), logging_on_stderr(verbose=False), one_line_refusals():
        from flows.store.inventory import HEAD, list_artifacts

        found = list_artifacts(store=store, kind=kind, run=run)
    if as_json:
        typer.echo(json.dumps([one.as_json() for one in found]))
        return
    from flows.cli.console import print_table

    print_table(HEAD, [one.as_row() for one in found])


def cp(
    ref: RefArgument,
    target: Annotated[str, typer.Argument(help="Folder or s3://bucket/prefix to copy it into.")],
    *,
    inputs: Annotated[bool, typer.Option("--inputs", help="Also copy all that it was made of.")] = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Copy an artifact into another store, each file compared with its hash; what was begun goes on."""
    with stdout_for_results(), logging_on_stderr(verbose=False), one_line_refusals():
        from flows.runs.progress import on_stderr
        from flows.store.inventory import copy

        with on_stderr() as display:
            update = functools.partial(display.update, "cp, MiB")
            made = copy(ref, target, store=store, inputs=inputs, progress=update)
            display.end("cp, MiB")
    if as_json:
        typer.echo(json.dumps([{**one._asdict(), "ref": str(one.ref), "uri": one.ref.uri} for one in made]))
        return
    for one in made:
        state = "was there" if one.was_there else f"{one.files:,} files copied, {one.skipped:,} were there"
        typer.echo(f"{one.ref}  {state}")


def gc(
    *,
    keep_last: Annotated[int, typer.Option(min=1, help="Runs of each recipe that stay, however old.")] = 5,
    older_than: Annotated[str, typer.Option(metavar="AGE", help="Younger runs stay: 12h, 7d, 4w.")] = "7d",
    grace: Annotated[
        str, typer.Option(metavar="AGE", help="What was written to more recently may be at work, and stays.")
    ] = "1d",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Remove nothing, show what would go.")] = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove old runs and what only they stood on, and what killed runs left; never what a kept run stands on."""
    with stdout_for_results(), logging_on_stderr(verbose=False), one_line_refusals():
        from flows.store.garbage import collect_garbage

        made = collect_garbage(
            store=store,
            keep_last=keep_last,
            older_than=_age("--older-than", older_than),
            grace=_age("--grace", grace),
            dry_run=dry_run,
        )
    if as_json:
        typer.echo(json.dumps(made.as_json()))
        return
    for line in made.lines():
        typer.echo(line)


def _age(option: str, text: str) -> timedelta:
    """Parse a span of time as people write it.

    Raises:
        ValueError: it is written otherwise.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([hdw])", text.strip())
    if found is None:
        raise ValueError(f"{option} {text!r} is no age: write 12h, 7d or 4w")
    return timedelta(hours=float(found[1]) * {"h": 1, "d": 24, "w": 168}[found[2]])


def pin(
    ref: RefArgument,
    *,
    reason: Annotated[str, typer.Option(help="Why, for those who find it later.")] = "",
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Keep an artifact, and all that it stands on, from being collected."""
    with stdout_for_results(), logging_on_stderr(verbose=False), one_line_refusals():
        from flows.store.inventory import pin as keep

        made = keep(ref, store=store, reason=reason)
    if as_json:
        typer.echo(made.model_dump_json())
    else:
        typer.echo(
            f"{made.kind}/{made.digest} is pinned since {made.pinned_at}{f': {made.reason}' * bool(made.reason)}"
        )


def unpin(ref: RefArgument, *, store: StoreOption = None) -> None:
    """Let an artifact go that was pinned."""
    with stdout_for_results(), logging_on_stderr(verbose=False), one_line_refusals():
        from flows.store.inventory import unpin as let_go

        name = let_go(ref, store=store)
    typer.echo(f"{name} is no longer pinned")


def openlineage(
    run: Annotated[str, typer.Argument(help="A run of the store, as `sftok report` and the history page name it.")],
    *,
    store: StoreOption = None,
) -> None:
    """Print a run as OpenLineage events, a JSON array: what each stage read and wrote."""
    with stdout_for_results(), logging_on_stderr(verbose=False), one_line_refusals():
        from flows.store.openlineage import events

        told = events(run, store=store)
    typer.echo(json.dumps(told, indent=1))
