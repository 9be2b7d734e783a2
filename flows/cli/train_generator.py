"""`sftok train-generator`: a generator of codes that are in the store. What is heavy is imported when it runs."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.console import logging_on_stderr, stdout_for_results
from flows.cli.options import (
    DeviceOption,
    JsonOption,
    StoreOption,
    VerboseOption,
    device_override,
    fail_if,
    one_line_refusals,
    one_line_termination,
    server_failures,
)

if TYPE_CHECKING:
    from flows.requests.generator import GeneratorRequest
    from flows.runs.journal import RunRecord

SHOWN = {"val_nll": "nats a held-out code", "frequency_nll": "by class and position alone", "tokens_per_s": "codes/s"}


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(epilog=EXAMPLES)(train_generator)


EXAMPLES = """\b
Examples:
  sftok train-generator --codes codes/1f2e
  sftok train-generator --codes 1f2e --recipe imagenet256_ar_b --ranks 8
  sftok train-generator --codes 1f2e --recipe digits_maskgit --set train_generator.steps=2000 --seed 1 --json
  sftok train-generator --codes s3://bucket/prefix/artifacts/codes/1f2e... --set train_generator.any_tokenizer=true
"""


def train_generator(
    *,
    codes: Annotated[str, typer.Option(help="A code dataset: kind/digest, its beginning, or a full URI.")],
    recipe: Annotated[
        str, typer.Option(help="A recipe, or a .toml file, whose generator and its training are meant.")
    ] = "digits",
    store: StoreOption = None,
    ranks: Annotated[
        int, typer.Option(min=1, help="Training processes, on a GPU each where Ray has as many; they share a step.")
    ] = 1,
    device: DeviceOption = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of everything random. [default: the recipe's]")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="SECTION.FIELD=VALUE", help="Change a setting of generator, train_generator or compute."
        ),
    ] = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Train a generator on a code dataset; what was trained alike before is found, and what was interrupted goes on."""
    with one_line_termination(), stdout_for_results(), logging_on_stderr(verbose), one_line_refusals():
        from flows.requests.generator import check_generator_request

        overrides = [*(set_ or ()), *device_override(device)]
        request = check_generator_request(recipe, codes=codes, store=store, overrides=overrides, ranks=ranks, seed=seed)
        record, error = _run(request, verbose=verbose)
    shown = _as_json(record, request, error)
    if as_json:
        typer.echo(json.dumps(shown, allow_nan=False))
    else:
        _show(shown)
    fail_if(error)


def _run(request: "GeneratorRequest", *, verbose: bool) -> "tuple[RunRecord, str | None]":
    """The record of a run, and what stopped it."""
    from flows.cli.launch import FlowRun, run_flow
    from flows.runs.journal import new_run_id

    name = new_run_id(request.recipe.name)

    def call() -> "RunRecord":
        from flows.pipeline.train_generator import train_on_codes

        place, codes = request.store.uri, str(request.codes)
        return train_on_codes(request.recipe, run=name, store=place, codes=codes, ranks=request.ranks)

    title = f"run {name}: generator of {request.recipe.name} on {request.codes}, store {request.store.uri}"
    limit = f"train-generator-{request.recipe.name}"
    with server_failures():
        flow_run = FlowRun(title, limit, request.store, call, ranks=request.ranks)
        return run_flow(flow_run, request.settings, verbose=verbose)


def _as_json(record: "RunRecord", request: "GeneratorRequest", error: str | None) -> dict[str, Any]:
    from infra.artifacts.manifest import manifest_of

    stage = record.stages.get("train_generator")
    ref = stage.ref if stage else None
    result: dict[str, Any] = {"run": record.run, "codes": str(request.codes), "state": stage.state if stage else None}
    result |= {"seconds": stage.seconds if stage else 0.0}
    result |= {"generator": str(ref) if ref else None, "uri": ref.uri if ref else None}
    result["metrics"] = dict(manifest_of(request.store, ref).metrics) if ref else None
    return result | {"error": error} if error else result


def _show(shown: dict[str, Any]) -> None:
    if not shown["generator"]:
        return
    typer.echo(f"{shown['generator']}  {'trained before' if shown['state'] == 'Cached' else 'trained'}")
    typer.echo(f"codes      {shown['codes']}")
    typer.echo(f"uri        {shown['uri']}")
    for name, what in SHOWN.items():
        if name in shown["metrics"]:
            typer.echo(f"{shown['metrics'][name]:<10.4g} {what}")
