"""`sftok serve`: everything that runs by schedule, in one process. What is heavy is imported when it runs."""

import json
from enum import StrEnum
from typing import Annotated, Any

import typer

from flows.cli.console import logging_on_stderr, stdout_for_results
from flows.cli.exits import one_line_refusals, server_failures
from flows.cli.options import StoreOption, VerboseOption

EXAMPLES = """\b
Examples:
  sftok serve
  sftok serve --recipe imagenet256_sftok_b --data s3://bucket/imagenet --store s3://bucket/prefix --gpus 8
  sftok serve --recipe digits --pipeline-cron '30 2 * * *' --check-cron off --set train_generator.steps=1200
  sftok serve --dry-run
"""

DIGITS = ["digits"]


class OverlapOption(StrEnum):
    """Policy for a second run while the first is under way."""

    wait = "wait"
    cancel = "cancel"


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(epilog=EXAMPLES)(serve)


def serve(
    *,
    recipe: Annotated[list[str], typer.Option(help="Recipe with a pipeline of its own; repeatable.")] = DIGITS,
    data: Annotated[str | None, typer.Option(help="Images, as `sftok run` takes them. [default: recipe's]")] = None,
    store: StoreOption = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Change a setting; repeatable.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of everything random. [default: the recipe's]")] = None,
    workers: Annotated[int | None, typer.Option(min=0, help="Ray workers of a run, as of `sftok run`.")] = None,
    gpus_per_worker: Annotated[float | None, typer.Option(min=0, help="GPUs of a Ray worker.")] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Training processes of a run.")] = 1,
    pipeline_cron: Annotated[str, typer.Option(help="When the whole pipeline runs, or off.")] = "0 3 * * 0",
    check_cron: Annotated[
        str, typer.Option(help="When the data are listed, and encoded if they have changed, or off.")
    ] = "0 1 * * *",
    report_cron: Annotated[str, typer.Option(help="When the last run is measured, or off.")] = "0 5 * * *",
    timezone: Annotated[str, typer.Option(help="Of the schedules, such as Europe/Berlin.")] = "UTC",
    overlap: Annotated[
        OverlapOption, typer.Option(help="What a second run of a recipe on a store does while the first is under way.")
    ] = OverlapOption.wait,
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs that all runs share. [default: as set before]")] = None,
    port: Annotated[
        int, typer.Option(min=1, max=65535, help="Of the server, unless PREFECT_API_URL names one.")
    ] = 4200,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print as JSON what would be registered.")] = False,
    verbose: VerboseOption = False,
) -> None:
    """Run pipelines, re-tokenizations and reports by schedule, until stopped; needs nothing but this process."""
    shown: dict[str, Any] = {}
    with stdout_for_results(), logging_on_stderr(verbose), one_line_refusals():
        from flows.service.serve import ServeOptions, as_json, check_options, plan
        from flows.service.serve import serve as serve_until_stopped

        options = ServeOptions(
            recipes=tuple(recipe),
            data=data,
            store=store,
            overrides=tuple(set_ or ()),
            seed=seed,
            workers=workers,
            gpus_per_worker=gpus_per_worker,
            ranks=ranks,
            overlap=overlap.value,
            pipeline_cron=pipeline_cron,
            check_cron=check_cron,
            report_cron=report_cron,
            timezone=timezone,
            gpus=gpus,
            port=port,
        )
        check_options(options, contact=not dry_run)
        if dry_run:
            shown = as_json(plan(options), options)
        else:
            with server_failures():
                serve_until_stopped(options, say=lambda line: typer.echo(line, err=True), verbose=verbose)
    if dry_run:
        typer.echo(json.dumps(shown, indent=2))
