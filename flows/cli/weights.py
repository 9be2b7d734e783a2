"""Commands about weights: published ones in, ours out, and pictures through a tokenizer and back."""

import functools
import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.console import logging_on_stderr, stdout_for_results
from flows.cli.exits import Failed, one_line_refusals
from flows.cli.options import JsonOption, StoreOption


class WeightsKind(StrEnum):
    """Kinds of weights in a file."""

    sftok = "sftok"
    teacher = "teacher"


class Layout(StrEnum):
    """Naming of weights."""

    published = "published"
    native = "native"


class FileFormat(StrEnum):
    """File format of weights."""

    safetensors = "safetensors"
    bin = "bin"


def register(app: typer.Typer) -> None:
    """Add the commands of this module to the command line."""
    app.command("import-weights", epilog=IMPORT_EXAMPLES)(import_weights)
    app.command("export-weights", epilog=EXPORT_EXAMPLES)(export_weights)
    app.command("reconstruct", epilog=RECONSTRUCT_EXAMPLES)(reconstruct)


IMPORT_EXAMPLES = """\b
Examples:
  sftok import-weights pytorch_model.bin --kind sftok
  sftok import-weights maskgit-vqgan-imagenet-f16-256.bin --kind teacher --store s3://bucket/prefix
  sftok import-weights exported/ --kind sftok --json
"""


def import_weights(
    file: Annotated[str, typer.Argument(help="A .bin or .safetensors, or a folder of one and perhaps config.json.")],
    *,
    kind: Annotated[WeightsKind, typer.Option(help="What the file holds.")],
    config: Annotated[
        str | None, typer.Option(help="A config.json of the weights. [default: the one in the folder, if any]")
    ] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make published weights an artifact; every key is compared, and no code in the file is run."""
    with stdout_for_results(), logging_on_stderr(verbose=False), one_line_refusals():
        from flows.store import weights

        made = weights.import_weights(file, kind=kind.value, store=store, config_json=config)
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
    layout: Annotated[Layout, typer.Option(help="Names of the published code, or this project's.")] = Layout.published,
    format_: Annotated[
        FileFormat, typer.Option("--format", help="safetensors, or torch.save's .bin.")
    ] = FileFormat.safetensors,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a tokenizer or a teacher into a folder; existing files are never overwritten."""
    with stdout_for_results(), logging_on_stderr(verbose=False), one_line_refusals():
        from flows.store import weights

        made = weights.export_weights(ref, folder, layout=layout.value, store=store, format=format_.value)
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
    steps: Annotated[int, typer.Option(min=1, help="Decoding steps.")] = 8,
    temperature: Annotated[float, typer.Option(min=0, help="Noise of the first step; 0: none.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Send pictures through a tokenizer and back: both side by side, and the codes between as Parquet."""
    with stdout_for_results(), logging_on_stderr(verbose=False), one_line_refusals():
        from flows.inference.reconstruct import ReconstructRequest
        from flows.inference.reconstruct import reconstruct as run
        from flows.runs.progress import on_stderr
        from sftok.config import DecodingConfig

        decoding = DecodingConfig(num_steps=steps, temperature=temperature)
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
