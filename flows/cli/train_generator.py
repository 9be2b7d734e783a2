"""`sftok train-generator`: a generator of codes that are in the store. What is heavy is imported when it runs."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.console import logging_on_stderr, print_findings, stdout_for_results
from flows.cli.exits import fail_if, one_line_refusals, one_line_termination
from flows.cli.options import (
    DeviceOption,
    JsonOption,
    RanksOption,
    SeedOption,
    StoreOption,
    VerboseOption,
    device_override,
)

if TYPE_CHECKING:
    from flows.runs.journal import RunRecord

SHOWN = {
    "val_nll": "held-out NLL per token, nats",
    "frequency_nll": "class-and-position unigram baseline",
    "tokens_per_s": "codes/s",
}


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
    ranks: RanksOption = "1",
    device: DeviceOption = None,
    seed: SeedOption = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="SECTION.FIELD=VALUE", help="Change a setting of generator, train_generator or compute."
        ),
    ] = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Train a generator on a code dataset; the same training is cached, and one that was interrupted is resumed."""
    with one_line_termination(), stdout_for_results(), logging_on_stderr(verbose), one_line_refusals():
        from flows.cli.launch import launch
        from flows.requests.generator import check_generator_request

        overrides = [*(set_ or ()), *device_override(device)]
        request = check_generator_request(recipe, codes=codes, store=store, overrides=overrides, ranks=ranks, seed=seed)
        record, error = launch(request, verbose=verbose)
    shown = _as_json(record, error)
    if as_json:
        typer.echo(json.dumps(shown, allow_nan=False))
    else:
        _show(shown)
        print_findings(record.findings)
    fail_if(error)


def _as_json(record: "RunRecord", error: str | None) -> dict[str, Any]:
    from infra.artifacts.manifest import manifest_of
    from infra.store.store import Store

    stage = record.stages.get("train_generator")
    ref = stage.ref if stage else None
    result: dict[str, Any] = {"run": record.run, "codes": record.source, "state": stage.state if stage else None}
    result |= {"seconds": stage.seconds if stage else 0.0}
    result |= {"generator": str(ref) if ref else None, "uri": ref.uri if ref else None}
    result["metrics"] = dict(manifest_of(Store(record.store), ref).metrics) if ref else None
    result["findings"] = [one.as_json() for one in record.findings or ()]
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
