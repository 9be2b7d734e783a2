"""`sftok sample`: codes from a generator of the store, and their images. What is heavy is imported when it runs."""

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.config_options import OptionsOf, config_command
from flows.cli.console import log_lines_above, logging_on_stderr, stdout_for_results
from flows.cli.exits import Failed, one_line_refusals
from flows.cli.options import (
    AnewOption,
    DeviceOption,
    GpusPerWorkerOption,
    JsonOption,
    StoreOption,
    WorkersOption,
)

if TYPE_CHECKING:
    from flows.inference.sample import SampleResult
    from generator.config import SampleConfig
    from sftok.config import DecodingConfig

SHARD = 256  # rows, or as many more as fill the last micro-batch
NAMED = 5  # classes named on the terminal, at most


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    config_command(app, epilog=EXAMPLES)(sample)


EXAMPLES = """\b
Examples:
  sftok sample --generator generator/1f2e --grid samples.png
  sftok sample --generator 1f2e --classes 0-9,12 --per-class 16 --cfg-scale 2 --images samples
  sftok sample --generator 1f2e --classes 'tench, Tinca tinca' --classes goldfish --seed 7 --json
  sftok sample --generator 1f2e --per-class 50 --precision bf16 --compile --npz samples.npz
"""


def sample(
    *,
    generator: Annotated[str, typer.Option(help="A generator: kind/digest, its beginning, or a full URI.")],
    classes: Annotated[
        list[str] | None,
        typer.Option(help="Names, ids (10, or '#10') or ranges of ids; repeat or use commas. [default: all classes]"),
    ] = None,
    config: Annotated["SampleConfig", OptionsOf("generator.config", omit=("samples_per_shard",))],
    device: DeviceOption = None,
    anew: AnewOption = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draw.")] = 0,
    workers: WorkersOption = None,
    gpus_per_worker: GpusPerWorkerOption = None,
    images: Annotated[str | None, typer.Option(help="Write a folder of PNG files, class by class.")] = None,
    grid: Annotated[str | None, typer.Option(help="Write a contact sheet with class names, as PNG.")] = None,
    npz: Annotated[str | None, typer.Option(help="Write all images into one array, as ADM's evaluator wants.")] = None,
    decoding: Annotated[
        "DecodingConfig", OptionsOf("sftok.config", only=("num_steps",), names={"num_steps": "--decode-steps"})
    ],
    tokenizer: Annotated[
        str | None, typer.Option(help="The tokenizer that paints. [default: the one of the generator's codes]")
    ] = None,
    any_tokenizer: Annotated[
        bool, typer.Option("--any-tokenizer", help="Take --tokenizer though the codes are another one's.")
    ] = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Draw class-balanced samples; what was drawn before is found, and images are decoded only if asked for."""
    with stdout_for_results(), logging_on_stderr(verbose=False):
        with one_line_refusals():
            from flows.inference.files import Outputs
            from flows.inference.sample import SampleArguments, check
            from flows.inference.sample import sample as run
            from flows.inference.tokenizer import Choice
            from flows.recipes.schema import ComputeConfig
            from flows.runs.progress import on_stderr

            batch = config.micro_batch or SHARD
            config = config.model_copy(update={"samples_per_shard": -(-SHARD // batch) * batch})
            outputs = Outputs(*(Path(path).expanduser() if path else None for path in (images, grid, npz)))
            width, choice = (store, workers, gpus_per_worker), Choice(tokenizer, any_tokenizer)
            compute = ComputeConfig(device=device or "auto")
            asked = SampleArguments(
                generator, config, seed, classes or (), outputs, decoding.num_steps, *width, choice, compute, anew
            )
            request = check(asked)
        try:
            with on_stderr() as display, log_lines_above(display):
                made = run(request, lambda stage: functools.partial(display.update, stage))
        except (ValueError, OSError) as error:
            raise Failed(f"{error}; once that is mended, the same command resumes from here") from error
    if as_json:
        typer.echo(json.dumps(made.as_json()))
    else:
        _show(made, request.info.class_names or ())


def _show(made: "SampleResult", names: "tuple[str, ...]") -> None:
    typer.echo(f"{made.ref}  {'drawn before' if made.state == 'Cached' else 'drawn'}")
    typer.echo(f"generator  {made.generator}")
    shown = ", ".join(names[class_id] for class_id in made.classes[:NAMED])
    more = f" and {len(made.classes) - NAMED:,} more" if len(made.classes) > NAMED else ""
    of_each = f", {made.per_class:,} of each of {len(made.classes):,} classes: {shown}{more}" if made.classes else ""
    typer.echo(f"samples    {made.samples:,}{of_each}")
    typer.echo(f"uri        {made.ref.uri}")
    for path in made.outputs:
        if path is not None:
            typer.echo(str(path))
