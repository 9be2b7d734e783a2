"""`sftok weights`: what others trained and this project can use, and how it gets into the store."""

import functools
import json
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.console import logging_on_stderr, stdout_for_results
from flows.cli.exits import one_line_refusals
from flows.cli.options import JsonOption, StoreOption

if TYPE_CHECKING:
    from flows.requests.weights_catalogue import Listed

LIST_EXAMPLES = """\b
Examples:
  sftok weights
  sftok weights add inception-2015 weights-inception-2015-12-05-6726825d.pth
  sftok weights fetch lpips-vgg16 --store s3://bucket/prefix
"""

ADD_EXAMPLES = """\b
Examples:
  sftok weights add inception-2015 ~/Downloads/weights-inception-2015-12-05-6726825d.pth
  sftok weights add maskgit-vqgan maskgit-vqgan-imagenet-f16-256.bin --json
"""

FETCH_EXAMPLES = """\b
Examples:
  sftok weights fetch inception-2015
  sftok weights fetch dino-vits16 --store s3://bucket/prefix
"""

NameArgument = Annotated[str, typer.Argument(help="A name of `sftok weights`.")]

commands = typer.Typer(invoke_without_command=True, epilog=LIST_EXAMPLES, add_completion=False)


def register(app: typer.Typer) -> None:
    """Add the commands of this module to the command line."""
    app.add_typer(commands, name="weights")


@commands.callback()
def weights(context: typer.Context, *, store: StoreOption = None, as_json: JsonOption = False) -> None:
    """List weights that others trained and this project can use: for what, from where, and whether they are here."""
    if context.invoked_subcommand is not None:
        return
    with stdout_for_results(), logging_on_stderr(verbose=False), one_line_refusals():
        from flows.requests.weights_catalogue import listed

        found = listed(store)
    if as_json:
        typer.echo(json.dumps([one.as_json() for one in found]))
        return
    for one in found:
        entry = one.entry
        typer.echo(f"{entry.name:<15} {'in the store' if one.record else 'not here'}")
        typer.echo(f"  for      {entry.use}")
        typer.echo(f"  from     {entry.source}")
        typer.echo(f"  licence  {entry.licence}")
        typer.echo(f"  sha256   {one.as_json()['sha256'] or 'not published; noted when it is added'}")
        typer.echo(f"  use      {one.as_json()['setting']}")


@commands.command(epilog=ADD_EXAMPLES)
def add(
    name: NameArgument,
    file: Annotated[str, typer.Argument(help="The file, as its publisher gave it out.")],
    *,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put a local file into the store, after checking its hash and what it holds; no code in it is run."""
    with stdout_for_results(), logging_on_stderr(verbose=False), one_line_refusals():
        from flows.requests import weights_catalogue

        made = weights_catalogue.add(name, file, store=store)
    _show(made, as_json=as_json)


@commands.command(epilog=FETCH_EXAMPLES)
def fetch(name: NameArgument, *, store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Download a file from its publisher into the store, checked as by `add`."""
    with stdout_for_results(), logging_on_stderr(verbose=False), one_line_refusals():
        from flows.requests import weights_catalogue
        from flows.runs.progress import on_stderr

        with on_stderr() as display:
            made = weights_catalogue.fetch(name, store=store, progress=functools.partial(display.update, "fetch"))
    _show(made, as_json=as_json)


def _show(made: "Listed", *, as_json: bool) -> None:
    told = made.as_json()
    if as_json:
        typer.echo(json.dumps(told))
        return
    typer.echo(f"{told['name']}  sha256 {told['sha256']}")
    typer.echo(f"uri  {told['uri']}")
    typer.echo(f"use  {told['setting']}")
