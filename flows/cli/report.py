"""`sftok report`, the page of a run beside an earlier one and the gate, and `sftok statistics`."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.console import logging_on_stderr, print_findings, print_table, stdout_for_results
from flows.cli.exits import GATE_FAILED, one_line_refusals
from flows.cli.options import JsonOption, StoreOption

if TYPE_CHECKING:
    from flows.report.benchmark import ReportResult

EXAMPLES = """\b
Examples:
  sftok report
  sftok report --run 20261125-014226-digits-dc1e --against 20261124-232443-digits-602a --out page
  sftok report --against published --json
  sftok report --gate --threshold 'reconstruction.psnr@*=0.5' --threshold generation.class_agreement=0.01
"""


STATISTICS_EXAMPLES = """\b
Examples:
  sftok statistics features/1f2e imagenet-256.npz
  sftok run imagenet256_ar_b --data DIR --set evaluate.scores.protocol=adm --set evaluate.scores.reference=VIRTUAL.npz
"""


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command(epilog=EXAMPLES)(report)
    app.command(epilog=STATISTICS_EXAMPLES)(statistics)


def statistics(
    ref: Annotated[str, typer.Argument(help="Features of real images, as `sftok ls --kind features` lists them.")],
    file: Annotated[str, typer.Argument(help="The .npz to write.")],
    *,
    store: StoreOption = None,
) -> None:
    """Write reference statistics as an .npz that clean-fid, pytorch-fid and ADM's evaluator read."""
    with stdout_for_results(), logging_on_stderr(verbose=False), one_line_refusals():
        from flows.evaluation.reference import export_statistics

        count = export_statistics(ref, file, store=store)
    typer.echo(f"{file}: statistics of {count:,} images")


def report(
    *,
    run: Annotated[
        list[str] | None,
        typer.Option("--runs", "--run", help="The run; repeat it for several. [default: the last evaluated one]"),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="A run to hold it against, or: published. [default: the last good one of the same recipe]"),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(help="Local folder for the pages, of several runs one below it each. [default: in the store]"),
    ] = None,
    gate: Annotated[
        bool, typer.Option("--gate", help="Exit with 3 if a figure became worse than its threshold allows.")
    ] = False,
    threshold: Annotated[
        list[str] | None,
        typer.Option(metavar="METRIC=LOSS", help="How much worse a metric may be. [default: the recipe's gate]"),
    ] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the report of a run as one HTML page, Markdown and JSON, and the page of all runs beside it."""
    with stdout_for_results(), logging_on_stderr(verbose=False), one_line_refusals():
        from flows.report.benchmark import gate_of, write_report
        from infra.store.store import Store

        place, made = Store.usual(store), []
        chosen: list[str | None] = [*run] if run else [None]
        for name in chosen:
            folder = f"{out}/{name}" if out and run and len(run) > 1 else out
            asked = gate_of(place, name, threshold or ()) if gate or threshold else None
            made.append(write_report(place, run=name, against=against, out=folder, gate=asked))
    if as_json:
        told = [one.as_json() for one in made]
        typer.echo(json.dumps(told if len(told) > 1 else told[0]))
    else:
        for one in made:
            _show(one)
    for one in made:
        _say_gate(one)
    if not all(one.is_passed for one in made):
        raise typer.Exit(GATE_FAILED)


def _show(made: "ReportResult") -> None:
    if made.comparison is not None:
        rows = [
            (row.name, f"{row.value:.5g}", f"{row.other:.5g}", "not comparable" if row.why_not else row.verdict)
            for row in made.comparison.rows
        ]
        print_table(("figure", made.run, made.against or "", ""), rows)
    print_findings(made.findings)
    for name in made.files:
        typer.echo(name)


def _say_gate(made: "ReportResult") -> None:
    if made.gate is None:
        return
    for loss in made.gate.losses:
        typer.echo(f"gate: {loss}", err=True)
    if made.gate.passed:
        typer.echo(f"gate: passed, {made.gate.held} figures held against {made.gate.against}", err=True)
