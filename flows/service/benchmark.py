"""The benchmark flow: evaluate what is not evaluated yet, write the report beside the last good run, ask the gate."""

import logging
from pathlib import Path
from typing import Annotated

import httpx
from prefect import flow
from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)
from pydantic import Field, ValidationError

from flows.pipeline.full import full_pipeline
from flows.report.benchmark import ReportResult, choose, gate_of, write_report
from flows.requests.checks import check_rerun
from flows.results.gate import GateFailedError
from flows.runs.history import is_evaluated, records
from flows.runs.journal import RunRecord, new_run_id
from infra.store.store import Store

log = logging.getLogger(__name__)

KEY = "benchmark"


def measure(
    run: Annotated[str | None, Field(description="a run of the store; none: the last one")] = None,
    *,
    store: Annotated[str, Field(description="folder or s3://bucket/prefix that artifacts are kept in")],
    against: Annotated[
        str | None, Field(description="a run to hold it against, or: published; none: the last good one of its recipe")
    ] = None,
    gate: Annotated[
        bool, Field(description="fail, after publishing, if a figure became worse than its recipe allows")
    ] = False,
    out: Annotated[str | None, Field(description="local folder for the pages; none: in the store")] = None,
) -> ReportResult:
    """Publish a run's report; one that was not evaluated is run again first, which does only what is missing.

    Raises:
        GateFailedError: the gate was asked, and a figure became worse than it may.
        ValueError: there is no such run, or it cannot be compared.
    """
    place = Store(store)
    name = _evaluated(place, run)
    asked = gate_of(place, name, ()) if gate else None
    made = write_report(place, run=name, against=against, out=out, gate=asked)
    if made.gate is not None:
        _note(place, made)
    _show_in_prefect(place, made)
    if made.gate is not None and not made.gate.passed:
        raise GateFailedError(made.run, made.gate.losses)
    return made


benchmark = flow(name="benchmark", flow_run_name="benchmark {run}", persist_result=False)(measure)


def _evaluated(store: Store, run: str | None) -> str:
    """Return an evaluated run: the one that is asked for, or a rerun that finishes it."""
    found = records(store)
    wanted = next((one for one in reversed(found) if one.run == run or (run is None and one.is_whole)), None)
    if wanted is None or is_evaluated(wanted) or not wanted.is_whole:
        return choose(found, run).run
    if wanted.state == "Running":
        raise ValueError(f"run {wanted.run} is still running: wait for it, or name another one")
    request = check_rerun(wanted.run, store=store.uri)
    log.info("run %s is %s and not evaluated: what it lacks is done now", wanted.run, wanted.state)
    return full_pipeline(request, new_run_id(request.recipe.name)).run


def _note(store: Store, made: ReportResult) -> None:
    """Write the verdict of the gate into the run's record: a failed run is no baseline for later ones."""
    assert made.gate is not None
    key = f"runs/{made.run}/run.json"
    try:
        record = RunRecord.model_validate_json(store.read(key))
    except ValidationError:  # of an earlier version: its record stays as it is
        log.warning("%s/%s is of another version: what the gate said is not noted in it", store.uri, key)
        return
    noted = record.model_copy(update={"gate": "passed" if made.gate.passed else "failed"})
    store.write(key, noted.model_dump_json(indent=2).encode())


def _show_in_prefect(store: Store, made: ReportResult) -> None:
    """Publish the report as artifacts of the flow run; a server that rejects them does not fail the run."""
    rows = made.comparison.rows if made.comparison else ()
    then = {row.name: row for row in rows}
    table = [
        {
            "figure": name,
            "now": value,
            "then": then[name].other if name in then else None,
            "verdict": (then[name].why_not or then[name].verdict) if name in then else "",
        }
        for name, value in made.metrics.items()
    ]
    links = [_link(name) for name in made.files]
    title = f"{made.run} against {made.against or 'nothing'}"
    try:
        create_table_artifact(table, key=f"{KEY}-figures", description=title)
        create_link_artifact(links[0], link_text="report page", key=f"{KEY}-page")
        create_link_artifact(links[-1], link_text="all runs", key=f"{KEY}-history")
        markdown = next(name for name in made.files if name.endswith(".md"))
        create_markdown_artifact(_text(store, markdown), key=f"{KEY}-text")
        if made.picture is not None:
            create_image_artifact(_link(made.picture), key=f"{KEY}-pictures", description="originals, reconstructions")
    except httpx.HTTPError as error:
        log.warning("the report is not in Prefect: %s", error)


def _link(name: str) -> str:
    return name if "://" in name else Path(name).absolute().as_uri()


def _text(store: Store, name: str) -> str:
    if name.startswith(store.uri):
        return store.read(name.removeprefix(f"{store.uri}/")).decode()
    with open(name, encoding="utf-8") as file:
        return file.read()
