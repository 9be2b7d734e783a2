"""The `sftok` command. What is heavy is imported by the command that needs it, so that help is instant."""

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli import ablation, encode, report, sample, serve, train_generator, weights
from flows.cli import data as cli_data
from flows.cli import store as cli_store
from flows.cli.config_options import OptionsOf, config_command
from flows.cli.console import (
    StdoutError,
    console,
    logging_on_stderr,
    prepare_streams,
    print_findings,
    print_table,
    speak_utf8,
    stdout_for_results,
)
from flows.cli.exits import (
    INTERRUPTED,
    PIPE_CLOSED,
    Refused,
    check_folder,
    end_by,
    fail_if,
    one_line,
    one_line_refusals,
    one_line_termination,
    signals_as_themselves,
)
from flows.cli.options import AnewOption, JsonOption, StoreOption, VerboseOption
from infra.compute.threads import limit_spinning

if TYPE_CHECKING:
    from flows.pipeline.dry_run import DryRun
    from flows.runs.journal import RunRecord
    from flows.runs.run_request import RunArguments

app = typer.Typer(
    name="sftok",
    help="Discrete image tokenizers and the generators on top of them, as a pipeline.",
    epilog="Start with: sftok run digits",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with a code of `flows.cli.exits`; an error is one line on stderr."""
    if arguments is None:
        speak_utf8()
        arguments = sys.argv[1:]
    prepare_streams()
    limit_spinning()
    try:
        check_folder()
        with signals_as_themselves():
            code = app(args=list(arguments) or ["--help"], prog_name="sftok", standalone_mode=False)
        sys.stdout.flush()
    except StdoutError as error:
        is_pipe = isinstance(error.cause, BrokenPipeError)  # whose reader wants no more, as of `| head`
        code = PIPE_CLOSED if is_pipe else end_by(error.cause, "standard output")
    except OSError as error:
        code = end_by(error, error.filename)
    except typer.TyperException as error:
        typer.echo(f"sftok: {one_line(error.format_message())}", err=True)
        code = error.exit_code
    except KeyboardInterrupt:
        code = INTERRUPTED
    if code == INTERRUPTED:
        typer.echo("sftok: interrupted; the same command resumes from here", err=True)
    sys.exit(code if isinstance(code, int) else 0)


@config_command(
    app,
    epilog="""\b
Examples:
  sftok run digits
  sftok run small64 --data ~/pictures --store s3://bucket/prefix
  sftok run digits --set train_generator.steps=1200 --seed 1
  sftok run imagenet256_ar_3b --data s3://bucket/imagenet --ranks 8 --dry-run --gpu-memory 80
  sftok recipes digits --toml > mine.toml && sftok run mine.toml
""",
)
def run(
    *,
    asked: Annotated[
        "RunArguments",
        OptionsOf(
            "flows.runs.run_request",
            names={"recipe": "recipe", "overrides": "--set SECTION.FIELD=VALUE", "ranks": "--ranks N|LEAST:MOST"},
        ),
    ],
    max_reject_rate: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Share of images that may be rejected, from 1,000 on. [default: the recipe's]"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what each stage would do and take; nothing is trained or written.")
    ] = False,
    gpu_memory: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            max=1e6,
            help="Plan for GPUs of so many GB, with --dry-run. [default: SFTOK_GPU_MEMORY, or as GPUs have]",
        ),
    ] = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Run the whole pipeline, from images to report; stages that are done already are cached."""
    with one_line_termination(), stdout_for_results(), logging_on_stderr(verbose), one_line_refusals():
        from flows.requests.checks import check_request

        if gpu_memory is not None and not dry_run:
            raise Refused("--gpu-memory is what is planned for: add --dry-run, or state it in SFTOK_GPU_MEMORY")
        if max_reject_rate is not None:
            overrides = (*asked.overrides, f"data.max_reject_rate={max_reject_rate}")
            asked = asked.model_copy(update={"overrides": overrides})
        request = check_request(asked, is_run=not dry_run)
        if dry_run:
            from flows.pipeline.dry_run import dry_run as plan
            from flows.requests.gpu_card import find_card
            from infra.settings import Settings

            planned = plan(request, find_card(Settings(), gpu_memory), on_gpus=asked.request().recipe)
        else:
            from flows.cli.launch import launch

            record, error = launch(request, verbose=verbose)
    if dry_run:
        _show_plan(planned, as_json=as_json)
        return
    _show_run(record, error, as_json=as_json)


@app.command(
    epilog="""\b
Examples:
  sftok rerun 20261125-014226-digits-dc1e
  sftok rerun 20261125-014226-digits-dc1e --store s3://bucket/prefix --json
"""
)
def rerun(
    run: Annotated[str, typer.Argument(help="A run of the store: all that it was asked for is asked for again.")],
    *,
    store: StoreOption = None,
    anew: AnewOption = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Repeat or resume a run as its record says; stages whose artifacts are still there are cached."""
    with one_line_termination(), stdout_for_results(), logging_on_stderr(verbose), one_line_refusals():
        from flows.cli.launch import launch
        from flows.requests.checks import check_rerun

        record, error = launch(check_rerun(run, store=store, anew=anew), verbose=verbose)
    _show_run(record, error, as_json=as_json)


@app.command(
    epilog="""\b
Examples:
  sftok recipes
  sftok recipes digits --toml > mine.toml
"""
)
def recipes(
    name: Annotated[str | None, typer.Argument(help="A recipe to print; all are listed without it.")] = None,
    *,
    toml: Annotated[bool, typer.Option("--toml", help="Print a full TOML file to start from.")] = False,
) -> None:
    """List the recipes, or print one."""
    from flows.recipes.files import load_recipe, to_toml
    from flows.recipes.registry import RECIPES

    if name is None and toml:
        raise Refused("--toml prints one recipe: name it, as in `sftok recipes digits --toml`")
    if name is None:
        all_recipes = [make() for make in RECIPES.values()]
        rows = [(recipe.name, recipe.source or "--data DIR", recipe.description) for recipe in all_recipes]
        print_table(("recipe", "images", "description"), rows)
        return
    with one_line_refusals():
        recipe = load_recipe(name)
    typer.echo(to_toml(recipe) if toml else recipe.model_dump_json(indent=2))


@app.command(
    epilog="""\b
Examples:
  sftok show codes/1f2e
  sftok show images/1f2e --lineage
  sftok show 20261125-014226-digits-dc1e
  sftok show 1f2e3d --store s3://bucket/prefix --json
"""
)
def show(
    ref: Annotated[str, typer.Argument(help="kind/digest, the beginning of a digest, a full URI, or a run.")],
    *,
    lineage: Annotated[bool, typer.Option("--lineage", help="Also show what was made of it, and on.")] = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show an artifact's manifest and what it was made of, or a run: its stages, its figures, what to look at first."""
    with one_line_refusals():
        from flows.runs.journal import find_record
        from flows.store.lineage import describe

        if (record := find_record(ref, store)) is not None:
            _show_past(record, as_json=as_json)
            return
        shown = describe(ref, store=store, forward=lineage)
    if as_json:
        typer.echo(json.dumps(shown.as_json(), allow_nan=False))
    else:
        console().print(shown.as_rich())


@app.command(
    epilog="""\b
Examples:
  sftok doctor
  sftok doctor --store s3://bucket/prefix --json
"""
)
def doctor(*, store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Try everything a run stands on: what works, what does not, and the remedy. Exit code 1 if something does not."""
    with stdout_for_results(), logging_on_stderr(verbose=False):
        from flows.requests.doctor import examine

        checks = list(examine(store))
    if as_json:
        typer.echo(json.dumps({"ok": all(c.ok for c in checks), "checks": [c.as_json() for c in checks]}))
    else:
        print_table(
            ("check", "", "found", "remedy"),
            [(c.name, "works" if c.ok else "FAILS", c.detail, c.remedy) for c in checks],
        )
    if not all(check.ok for check in checks):
        raise typer.Exit(1)


weights.register(app)
ablation.register(app)
cli_data.register(app)
encode.register(app)
train_generator.register(app)
report.register(app)
sample.register(app)
serve.register(app)
cli_store.register(app)


# --- what is printed -------------------------------------------------------------------------------------------------


def _as_json(record: "RunRecord", error: str | None) -> dict[str, Any]:
    from flows.runs.journal import stages_as_json

    result: dict[str, Any] = {"run": record.run, "recipe": record.recipe.name, "stages": stages_as_json(record)}
    # Infinity becomes a string, as in the record: JSON has no such number.
    plain = json.loads(record.model_dump_json())
    result |= {"metrics": plain["metrics"], "report": record.report, "findings": plain["findings"]}
    return result | {"error": error} if error else result


def _show_run(record: "RunRecord", error: str | None, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(_as_json(record, error), allow_nan=False))
    else:
        _show_record(record)
    fail_if(error)


def _show_past(record: "RunRecord", *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"state": record.state, **_as_json(record, record.reason)}, allow_nan=False))
        return
    _show_record(record)
    typer.echo(f"{record.state}, begun {record.started_at}{f': {record.reason}' if record.reason else ''}")


def _show_plan(planned: "DryRun", *, as_json: bool) -> None:
    from flows.pipeline.dry_run import HEAD

    if as_json:
        typer.echo(json.dumps(planned.as_json()))
    else:
        print_table(HEAD, [stage.as_row() for stage in planned.stages])
        typer.echo(f"computed on {planned.device}")
        for note in planned.notes():
            typer.echo(note)
    if planned.refusal:
        raise Refused(planned.refusal)


def _show_record(record: "RunRecord") -> None:
    from flows.runs.journal import stage_rows

    print_table(("stage", "state", "seconds", "artifact"), stage_rows(record))
    if record.metrics:
        print_table(("metric", "value"), [(name, f"{value:.4g}") for name, value in record.metrics.items()])
    if record.report:
        typer.echo(f"report: {record.report}")
    print_findings(record.findings)
