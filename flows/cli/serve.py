"""`sftok serve`: everything that runs by schedule, in one process. What is heavy is imported when it runs."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.config_options import OptionsOf, config_command
from flows.cli.console import logging_on_stderr, stdout_for_results
from flows.cli.exits import one_line_refusals, server_failures
from flows.cli.options import VerboseOption

if TYPE_CHECKING:
    from flows.service.parameters import ServeOptions

EXAMPLES = """\b
Examples:
  sftok serve
  sftok serve --recipe imagenet256_sftok_b --data s3://bucket/imagenet --store s3://bucket/prefix --gpus 8
  sftok serve --recipe digits --pipeline-cron '30 2 * * *' --check-cron off --set train_generator.steps=1200
  sftok serve --dry-run
"""


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    config_command(app, epilog=EXAMPLES)(serve)


def serve(
    *,
    options: Annotated[
        "ServeOptions",
        OptionsOf(
            "flows.service.parameters",
            names={"recipes": "--recipe", "overrides": "--set SECTION.FIELD=VALUE", "ranks": "--ranks N|LEAST:MOST"},
        ),
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print as JSON what would be registered.")] = False,
    verbose: VerboseOption = False,
) -> None:
    """Run pipelines, re-tokenizations and reports by schedule, until stopped; needs nothing but this process."""
    shown: dict[str, Any] = {}
    with stdout_for_results(), logging_on_stderr(verbose), one_line_refusals():
        from flows.service.schedules import plan
        from flows.service.serve import as_json, check_options
        from flows.service.serve import serve as serve_until_stopped

        check_options(options, contact=not dry_run)
        if dry_run:
            shown = as_json(plan(options), options)
        else:
            with server_failures():
                serve_until_stopped(options, say=lambda line: typer.echo(line, err=True), verbose=verbose)
    if dry_run:
        typer.echo(json.dumps(shown, indent=2))
