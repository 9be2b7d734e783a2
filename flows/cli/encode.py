"""`sftok encode`: images to codes with a tokenizer of the store. What is heavy is imported when it runs."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.config_options import OptionsOf, config_command
from flows.cli.console import logging_on_stderr, stdout_for_results
from flows.cli.exits import fail_if, one_line_refusals, one_line_termination
from flows.cli.options import (
    AnewOption,
    DeviceOption,
    GpusPerWorkerOption,
    JsonOption,
    StoreOption,
    VerboseOption,
    WorkersOption,
    device_override,
)

if TYPE_CHECKING:
    from flows.recipes.schema import EncodeConfig
    from flows.runs.journal import RunRecord


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    config_command(app, epilog=EXAMPLES)(encode)


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
    config: Annotated["EncodeConfig", OptionsOf("flows.recipes.schema", commas=("variants", "val_variants"))],
    workers: WorkersOption = None,
    gpus_per_worker: GpusPerWorkerOption = None,
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
        from flows.cli.launch import launch
        from flows.requests.encode import check_encode_request

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
