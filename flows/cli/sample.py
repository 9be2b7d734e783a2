"""`sftok sample`: codes from a generator of the store, and their images. What is heavy is imported when it runs."""

import functools
import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.console import log_lines_above, logging_on_stderr, stdout_for_results
from flows.cli.exits import Failed, one_line_refusals
from flows.cli.options import AnewOption, DeviceOption, JsonOption, StoreOption

if TYPE_CHECKING:
    from flows.inference.sample import SampleResult
    from generator.config import SampleConfig

SHARD = 256  # rows, or as many more as fill the last micro-batch
NAMED = 5  # classes named on the terminal, at most


class ScheduleOption(StrEnum):
    """Schedule of guidance."""

    constant = "constant"
    linear = "linear"
    power_cosine = "power_cosine"


class PrecisionOption(StrEnum):
    """Arithmetic of the generator."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(epilog=EXAMPLES)(sample)


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
        typer.Option(help="Ids, ranges of ids, or names; repeat or use commas. [default: all classes]"),
    ] = None,
    per_class: Annotated[int, typer.Option(min=1, help="Samples of every class.")] = 50,
    cfg_scale: Annotated[float, typer.Option(min=0, help="Guidance; 1 is conditional only.")] = 1.0,
    cfg_schedule: Annotated[
        ScheduleOption, typer.Option(help="How guidance grows over codes or steps.")
    ] = ScheduleOption.constant,
    cfg_power: Annotated[float, typer.Option(help="Of power_cosine: the greater, the later it grows.")] = 1.0,
    temperature: Annotated[float, typer.Option(min=0, help="Of the draw; 0 takes the most likely code.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Keep the k most likely codes; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(max=1, help="Keep the most likely codes of this probability.")] = 1.0,
    num_steps: Annotated[int, typer.Option(min=1, help="Passes of a masked generator.")] = 8,
    annealing: Annotated[
        tuple[float, float] | None,
        typer.Option(help="a b: a masked generator's logits are divided by a + b * (1 - step / steps).", metavar="A B"),
    ] = None,
    precision: Annotated[
        PrecisionOption, typer.Option(help="Of the generator's products. auto: fp32 on CPUs, bf16 on CUDA.")
    ] = PrecisionOption.auto,
    compile_step: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Compile the step, up to a minute a worker; for GPUs, and for bf16 of autoregressive ones. "
            "[default: on CUDA]",
        ),
    ] = None,
    micro_batch: Annotated[
        int, typer.Option(min=0, help="Samples drawn, and decoded, at once. 0: 64 on CPUs, 256 on CUDA.")
    ] = 0,
    device: DeviceOption = None,
    anew: AnewOption = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draw.")] = 0,
    workers: Annotated[
        int | None,
        typer.Option(min=0, help="Ray workers; 0: none, all in one process. [default: 2, or what there is to do]"),
    ] = None,
    gpus_per_worker: Annotated[
        float | None,
        typer.Option(min=0, help="GPUs of a Ray worker; 0.5 lets two share one. [default: 1 where there are GPUs]"),
    ] = None,
    images: Annotated[str | None, typer.Option(help="Write a folder of PNG files, class by class.")] = None,
    grid: Annotated[str | None, typer.Option(help="Write a contact sheet with class names, as PNG.")] = None,
    npz: Annotated[str | None, typer.Option(help="Write all images into one array, as ADM's evaluator wants.")] = None,
    decode_steps: Annotated[int, typer.Option(min=1, help="Decoding steps of an image.")] = 8,
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

            config = _config(
                per_class=per_class,
                cfg_scale=cfg_scale,
                cfg_schedule=cfg_schedule.value,
                cfg_power=cfg_power,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                num_steps=num_steps,
                annealing=annealing,
                precision=precision.value,
                compile=compile_step,
                micro_batch=micro_batch,
                samples_per_shard=-(-SHARD // (micro_batch or SHARD)) * (micro_batch or SHARD),
            )
            outputs = Outputs(*(Path(path).expanduser() if path else None for path in (images, grid, npz)))
            width, choice = (store, workers, gpus_per_worker), Choice(tokenizer, any_tokenizer)
            compute = ComputeConfig(device=device.value if device else "auto")
            asked = SampleArguments(
                generator, config, seed, classes or (), outputs, decode_steps, *width, choice, compute, anew
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


def _config(**settings: Any) -> "SampleConfig":
    from pydantic import ValidationError

    from generator.config import SampleConfig

    try:
        return SampleConfig(**settings)
    except ValidationError as refused:
        first = refused.errors()[0]
        if not first["loc"]:  # of a whole config: it names the setting itself
            raise ValueError(f"--{first['msg'].removeprefix('Value error, ')}") from refused
        option = "--" + "-".join(map(str, first["loc"])).replace("_", "-")
        raise ValueError(f"{option} {first['input']}: {first['msg'][:1].lower()}{first['msg'][1:]}") from refused


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
