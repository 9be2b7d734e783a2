"""`sftok ablation`: one recipe trained in several ways, with several seeds. What is heavy is imported when it runs."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.console import logging_on_stderr, stdout_for_results
from flows.cli.exits import fail_if, one_line_refusals, one_line_termination
from flows.cli.options import (
    DataOption,
    DeviceOption,
    GpusPerWorkerOption,
    JsonOption,
    RanksOption,
    StoreOption,
    VerboseOption,
    WorkersOption,
    device_override,
)

if TYPE_CHECKING:
    from flows.runs.journal import RunRecord

EXAMPLES = """\b
Examples:
  sftok ablation digits_ablation
  sftok ablation digits_ablation --seeds 0,1,2,3,4 --set align.training.steps=800
  sftok ablation small64 --data ~/pictures --store s3://bucket/prefix --json
"""


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(epilog=EXAMPLES)(ablation)


def ablation(
    name: Annotated[
        str, typer.Argument(help="An ablation; or a recipe or TOML file, on which the paper's arms are trained.")
    ],
    *,
    data: DataOption = None,
    store: StoreOption = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Change a setting in every arm; repeatable."),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Every arm is trained with each of them, as in 0,1,2. [default: the ablation's]")
    ] = None,
    workers: WorkersOption = None,
    gpus_per_worker: GpusPerWorkerOption = None,
    ranks: RanksOption = "1",
    device: DeviceOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Train a recipe in several ways that differ in one thing each, as long and on the same batches; and compare."""
    with one_line_termination(), stdout_for_results(), logging_on_stderr(verbose), one_line_refusals():
        from flows.ablation.request import check_ablation_request
        from flows.cli.launch import launch

        request = check_ablation_request(
            name,
            data=data,
            store=store,
            overrides=[*(set_ or ()), *device_override(device)],
            seeds=seeds,
            workers=workers,
            ranks=ranks,
            gpus=gpus_per_worker,
        )
        record, error = launch(request, verbose=verbose)
    shown = _as_json(record, error)
    if as_json:
        typer.echo(json.dumps(shown, allow_nan=False))
    else:
        _show(shown)
    fail_if(error)


def _as_json(record: "RunRecord", error: str | None) -> dict[str, Any]:
    stages = {
        name: {"state": stage.state, "artifact": str(stage.ref) if stage.ref else None, "seconds": stage.seconds}
        for name, stage in record.stages.items()
    }
    # Infinity becomes a string, as in the record: JSON has no such number.
    metrics = json.loads(record.model_dump_json())["metrics"]
    told: dict[str, Any] = {"run": record.run, "ablation": record.recipe.name, "stages": stages}
    told |= {"metrics": metrics, "report": record.report}
    return told | {"error": error} if error else told


def _show(shown: dict[str, Any]) -> None:
    for name, stage in shown["stages"].items():
        typer.echo(f"{stage['state']:<10} {stage['seconds']:8.1f} s  {name}")
    for name, value in shown["metrics"].items():
        typer.echo(f"{value if isinstance(value, str) else format(value, '.4g'):>10}  {name}")
    if shown["report"]:
        typer.echo(f"report: {shown['report']}")
