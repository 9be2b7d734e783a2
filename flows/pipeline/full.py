"""The flows: the whole pipeline, from images to report, and the parts of it that start from artifacts."""

import logging
from pathlib import Path
from typing import Annotated

import httpx
from prefect import flow
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from pydantic import Field

from flows.pipeline import tasks
from flows.pipeline.tasks import RunContext
from flows.runs.journal import RunRecord, stage_rows
from flows.runs.run_request import RunRequest
from infra.artifacts.manifest import ArtifactRef, manifest_of
from infra.compute.cluster import session
from infra.settings import Settings
from infra.store.store import Store

log = logging.getLogger(__name__)


def run_stages(
    request: Annotated[RunRequest, Field(description="what the run was asked for, checked, with its device chosen")],
    run: Annotated[str, Field(description="name of this run, unique in the store")],
) -> RunRecord:
    """Run every stage that is not cached; the stages' artifacts and the record of the run are in the store."""
    this = RunContext.of(request, run)
    store, journal = this.job.store, this.journal
    with journal.kept(), session(Settings().ray_address, request.processes):
        made = tasks.walk(this, last=request.last, given=request.given)
        if "report" in made:
            journal.publish_report(manifest_of(store, made["evaluate"]), made["report"], is_judged=True)
    if "report" in made:
        _show_in_prefect(store, journal.record, made["report"])
    return journal.record


full_pipeline = flow(name="full-pipeline", flow_run_name="{run}", persist_result=False)(run_stages)
retokenize = full_pipeline.with_options(name="retokenize")
train_generator = full_pipeline.with_options(name="train-generator")
BY_LAST_STAGE = {None: full_pipeline, "encode": retokenize, "train_generator": train_generator}


def _show_in_prefect(store: Store, record: RunRecord, report: ArtifactRef) -> None:
    """Publish the report as artifacts of the flow run; a server that rejects them does not fail the run."""
    key = f"report-{record.recipe.name.lower().replace('_', '-')}"
    table = [dict(zip(("stage", "state", "seconds", "artifact"), row, strict=True)) for row in stage_rows(record)]
    page = store.at("artifacts", report.kind, report.digest)
    try:
        create_table_artifact(table, key=f"{key}-stages", description=f"Stages of {record.run}")
        create_table_artifact([{"metric": k, "value": v} for k, v in record.metrics.items()], key=f"{key}-metrics")
        if record.findings:
            table = [{"finding": one.sentence, "figures": one.facts, "try": one.remedies[0]} for one in record.findings]
            create_table_artifact(table, key=f"{key}-findings", description="What to look at first")
        if record.report is not None:
            link = record.report if "://" in record.report else Path(record.report).as_uri()
            create_link_artifact(link, link_text="report page", key=f"{key}-page")
        if page.exists("report.md"):
            create_markdown_artifact(page.read("report.md").decode(), key=f"{key}-text")
    except httpx.HTTPError as error:
        log.warning("the report is not in Prefect: %s", error)
