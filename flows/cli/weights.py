"""Commands about weights: others' and ours, in and out of the store; and pictures through a tokenizer and back."""

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from flows.cli.config_options import OptionsOf, config_command
from flows.cli.console import logging_on_stderr, stdout_for_results
from flows.cli.exits import Failed, one_line_refusals
from flows.cli.options import JsonOption, StoreOption

if TYPE_CHECKING:
    from flows.requests.weights_catalogue import Listed
    from sftok.config import DecodingConfig


def register(app: typer.Typer) -> None:
    """Add the commands of this module to the command line."""
    app.command(epilog=IMPORT_EXAMPLES)(import_weights)
    app.command(epilog=EXPORT_EXAMPLES)(export_weights)
    config_command(app, epilog=RECONSTRUCT_EXAMPLES)(reconstruct)
    app.add_typer(catalogue, name="weights")


IMPORT_EXAMPLES = """\b
Examples:
  sftok import-weights pytorch_model.bin --kind sftok
  sftok import-weights maskgit-vqgan-imagenet-f16-256.bin --kind teacher --store s3://bucket/prefix
  sftok import-weights exported/ --kind sftok --json
"""


def import_weights(
    file: Annotated[str, typer.Argument(help="A .bin or .safetensors, or a folder of one and perhaps config.json.")],
    *,
    kind: Annotated[Literal["sftok", "teacher"], typer.Option(help="What the file holds.")],
    config: Annotated[
        str | None, typer.Option(help="A config.json of the weights. [default: the one in the folder, if any]")
    ] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make published weights an artifact; every key is compared, and no code in the file is run."""
    with stdout_for_results(), logging_on_stderr(verbose=False), one_line_refusals():
        from flows.store import weights

        made = weights.import_weights(file, kind=kind, store=store, config_json=config)
    if as_json:
        typer.echo(json.dumps(made.as_json()))
        return
    typer.echo(f"{made.ref}  {'imported before' if made.state == 'Cached' else 'imported'}")
    typer.echo(f"size        {made.size}")
    typer.echo(f"layout      {made.layout}")
    typer.echo(f"parameters  {made.parameters:,} from {made.keys} keys, all of them used")
    typer.echo(f"uri         {made.ref.uri}")


EXPORT_EXAMPLES = """\b
Examples:
  sftok export-weights tokenizer/1f2e weights/
  sftok export-weights teacher/3a4b weights/ --layout native
  sftok export-weights tokenizer/1f2e weights/ --layout published --format bin
"""


def export_weights(
    ref: Annotated[str, typer.Argument(help="A tokenizer or a teacher: kind/digest, its beginning, or a full URI.")],
    folder: Annotated[str, typer.Argument(help="Folder for the weights and config.json.")],
    *,
    layout: Annotated[
        Literal["published", "native"], typer.Option(help="Names of the published code, or this project's.")
    ] = "published",
    format_: Annotated[
        Literal["safetensors", "bin"], typer.Option("--format", help="safetensors, or torch.save's .bin.")
    ] = "safetensors",
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a tokenizer or a teacher into a folder; existing files are never overwritten."""
    with stdout_for_results(), logging_on_stderr(verbose=False), one_line_refusals():
        from flows.store import weights

        made = weights.export_weights(ref, folder, layout=layout, store=store, format=format_)
    if as_json:
        typer.echo(json.dumps(made.as_json()))
        return
    typer.echo(f"{made.ref}: {made.parameters:,} parameters in the {made.layout} layout")
    for written in made.files:
        typer.echo(written)
    for caveat in made.caveats:
        typer.echo(f"note: {caveat}", err=True)


RECONSTRUCT_EXAMPLES = """\b
Examples:
  sftok reconstruct *.jpg --tokenizer tokenizer/1f2e --out pictures
  sftok reconstruct cat.png --tokenizer 1f2e --steps 1 --out one-step
  sftok reconstruct cat.png --tokenizer 1f2e --teacher teacher/3a4b --temperature 1 --seed 7 --out noisy
"""


def reconstruct(
    images: Annotated[list[str], typer.Argument(help="Picture files, of any format and size.")],
    *,
    tokenizer: Annotated[str, typer.Option(help="A tokenizer: kind/digest, its beginning, or a full URI.")],
    out: Annotated[str, typer.Option(help="Folder for the pairs, a contact sheet and the codes.")],
    teacher: Annotated[
        str | None, typer.Option(help="A teacher, for a tokenizer without pixel decoder. [default: the one it names]")
    ] = None,
    decoding: Annotated[
        "DecodingConfig", OptionsOf("sftok.config", omit=("precision",), names={"num_steps": "--steps"})
    ],
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Send pictures through a tokenizer and back: both side by side, and the codes between as Parquet."""
    with stdout_for_results(), logging_on_stderr(verbose=False), one_line_refusals():
        from flows.inference.reconstruct import ReconstructRequest
        from flows.inference.reconstruct import reconstruct as run
        from flows.runs.progress import on_stderr

        request = ReconstructRequest(images, tokenizer, teacher, Path(out).expanduser(), decoding, seed, store)
        with on_stderr() as display:
            made = run(request, functools.partial(display.update, "reconstruct"))
    if as_json:
        typer.echo(json.dumps(made.as_json()))
    else:
        for pair in made.pairs:
            typer.echo(f"{pair.image} -> {pair.file}  {pair.psnr:.2f} dB")
        for written in (made.sheet, made.codes):
            if written:
                typer.echo(str(written))
    for image, reason in made.rejects:
        typer.echo(f"{image}: {reason}", err=True)
    if made.rejects:
        raise Failed(f"{len(made.rejects)} of {len(made.rejects) + len(made.pairs)} pictures could not be read")


# --- what others trained: `sftok weights` -------------------------------------------------------------------------

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

catalogue = typer.Typer(invoke_without_command=True, epilog=LIST_EXAMPLES, add_completion=False)


@catalogue.callback()
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


@catalogue.command(epilog=ADD_EXAMPLES)
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
    _show_listed(made, as_json=as_json)


@catalogue.command(epilog=FETCH_EXAMPLES)
def fetch(name: NameArgument, *, store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Download a file from its publisher into the store, checked as by `add`."""
    with stdout_for_results(), logging_on_stderr(verbose=False), one_line_refusals():
        from flows.requests import weights_catalogue
        from flows.runs.progress import on_stderr

        with on_stderr() as display:
            made = weights_catalogue.fetch(name, store=store, progress=functools.partial(display.update, "fetch"))
    _show_listed(made, as_json=as_json)


def _show_listed(made: "Listed", *, as_json: bool) -> None:
    told = made.as_json()
    if as_json:
        typer.echo(json.dumps(told))
        return
    typer.echo(f"{told['name']}  sha256 {told['sha256']}")
    typer.echo(f"uri  {told['uri']}")
    typer.echo(f"use  {told['setting']}")
