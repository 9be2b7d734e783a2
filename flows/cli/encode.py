"""`sftok encode`: images to codes with a tokenizer of the store. What is heavy is imported when it runs."""

import json
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.console import logging_on_stderr, stdout_for_results
from flows.cli.exits import fail_if, one_line_refusals, one_line_termination
from flows.cli.options import AnewOption, DeviceOption, JsonOption, StoreOption, VerboseOption, device_override

if TYPE_CHECKING:
    from flows.runs.journal import RunRecord

DEFAULT = ["center"]


class AssignmentOption(StrEnum):
    """Assignment of codes."""

    nearest = "nearest"
    sinkhorn = "sinkhorn"


class PrecisionOption(StrEnum):
    """Arithmetic of the encoder."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


class DecoderOption(StrEnum):
    """Decoder of images."""

    pil = "pil"
    torchcodec = "torchcodec"


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(epilog=EXAMPLES)(encode)


EXAMPLES = """\b
Examples:
  sftok encode --tokenizer tokenizer/1f2e --data ~/pictures
  sftok encode --tokenizer 1f2e --data 's3://bucket/{0..1023}.tar' --variants center,flip --set data.num_shards=1024
  sftok encode --tokenizer 1f2e --data images/3d4c --precision bf16 --workers 16 --gpus-per-worker 0.5 --json
"""


def encode(
    *,
    tokenizer: Annotated[str, typer.Option(help="A tokenizer: kind/digest, its beginning, or a full URI.")],
    data: Annotated[str, typer.Option(help="Images, as `sftok run --data` takes them, or images/DIGEST of the store.")],
    store: StoreOption = None,
    variants: Annotated[
        list[str],
        typer.Option(help="Views of a training image: center, flip, affine-1 ..., ten_crop; repeat or use commas."),
    ] = DEFAULT,
    val_variants: Annotated[list[str], typer.Option(help="Views of a held-out image.")] = DEFAULT,
    assignment: Annotated[
        AssignmentOption, typer.Option(help="sinkhorn balances within a micro-batch, as published.")
    ] = AssignmentOption.nearest,
    precision: Annotated[
        PrecisionOption, typer.Option(help="bf16 changes some codes. auto: fp32 on CPUs, bf16 on CUDA.")
    ] = PrecisionOption.auto,
    micro_batch: Annotated[int, typer.Option(min=0, help="Images encoded at once. 0: 64 on CPUs, 256 on CUDA.")] = 0,
    decoder: Annotated[
        DecoderOption, typer.Option(help="torchcodec decodes JPEGs on the GPU, to slightly other pixels.")
    ] = DecoderOption.pil,
    workers: Annotated[
        int | None,
        typer.Option(min=0, help="Ray workers; 0: none, all in one process. [default: 2 or the cores if fewer]"),
    ] = None,
    gpus_per_worker: Annotated[
        float | None,
        typer.Option(min=0, help="GPUs of a Ray worker; 0.5 lets two share one. [default: 1 where there are GPUs]"),
    ] = None,
    device: DeviceOption = None,
    anew: AnewOption = False,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="SECTION.FIELD=VALUE", help="Change a setting of data, augment or compute; repeatable."
        ),
    ] = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Encode images with a tokenizer; shards that are there already, also of earlier versions of the data, are kept."""
    with one_line_termination(), stdout_for_results(), logging_on_stderr(verbose), one_line_refusals():
        from pydantic import ValidationError

        from flows.cli.launch import launch
        from flows.recipes.schema import EncodeConfig
        from flows.requests.encode import check_encode_request

        try:
            config = EncodeConfig(
                variants=_listed(variants),
                val_variants=_listed(val_variants),
                assignment=assignment.value,
                precision=precision.value,
                micro_batch=micro_batch,
                decoder=decoder.value,
            )
        except ValidationError as refused:
            raise ValueError(refused.errors()[0]["msg"].removeprefix("Value error, ")) from refused
        overrides = [*(set_ or ()), *device_override(device)]
        request = check_encode_request(
            config,
            tokenizer=tokenizer,
            data=data,
            store=store,
            overrides=overrides,
            workers=workers,
            gpus_per_worker=gpus_per_worker,
            anew=anew,
        )
        record, error = launch(request, verbose=verbose)
    shown = _as_json(record, error)
    if as_json:
        typer.echo(json.dumps(shown))
    else:
        _show(shown)
    fail_if(error)


def _listed(options: list[str]) -> tuple[str, ...]:
    return tuple(name.strip() for option in options for name in option.replace("|", ",").split(",") if name.strip())


def _as_json(record: "RunRecord", error: str | None) -> dict[str, Any]:
    from flows.runs.journal import stages_as_json
    from infra.artifacts.manifest import manifest_of
    from infra.store.store import Store

    made = record.stages.get("encode")
    codes = made.ref if made else None
    result: dict[str, Any] = {"run": record.run, "tokenizer": str(record.given["fine_tune"])}
    result["stages"] = stages_as_json(record)
    result |= {"codes": str(codes) if codes else None, "uri": codes.uri if codes else None}
    result["counts"] = dict(manifest_of(Store(record.store), codes).counts) if codes else None
    return result | {"error": error} if error else result


def _show(shown: dict[str, Any]) -> None:
    for name, stage in shown["stages"].items():
        typer.echo(f"{name:<8} {stage['state']:<10} {stage['seconds']:8.1f} s")
    if shown["codes"]:
        counts = shown["counts"]
        typer.echo(f"codes    {shown['codes']}")
        typer.echo(f"uri      {shown['uri']}")
        typer.echo(f"rows     {counts['rows']:,} in {counts['shards']:,} shards, {counts['reused']:,} of them reused")
        if counts["failed"]:
            typer.echo(f"failed   {counts['failed']:,} views, listed in failed.parquet")
