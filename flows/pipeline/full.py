"""The full pipeline, from images to report."""

import logging
from typing import Annotated

import httpx
from prefect import flow
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from pydantic import Field

from flows.pipeline import tasks
from flows.pipeline.tasks import Run
from flows.recipes.schema import Recipe
from flows.runs.journal import RunRecord, stage_rows, start_journal
from flows.stage import Job, Listing
from infra.artifacts.manifest import ArtifactRef, manifest_of
from infra.compute.cluster import session
from infra.compute.workers import WorkerOptions
from infra.settings import Settings
from infra.store.store import Store

log = logging.getLogger(__name__)


@flow(name="full-pipeline", flow_run_name="{run}", persist_result=False)
def full_pipeline(
    recipe: Annotated[Recipe, Field(description="what is computed")],
    *,
    run: Annotated[str, Field(description="name of this run, unique in the store")],
    store: Annotated[str, Field(description="folder or s3://bucket/prefix that artifacts are kept in")],
    source: Annotated[str, Field(description="images: a folder, or the name of a built-in source")],
    workers: Annotated[int, Field(ge=0, description="Ray workers; 0 does everything in one process")] = 2,
    gpus_per_worker: Annotated[float, Field(ge=0, description="GPUs a worker; 0.5 lets two share one")] = 0.0,
    ranks: Annotated[int, Field(ge=1, description="training processes, which share a step's micro-batches")] = 1,
    anew: Annotated[bool, Field(description="give up shards that another kind of device began")] = False,
) -> RunRecord:
    """Run every stage that is not done yet; the stages' artifacts and the record of the run are in `store`."""
    place = Store(store)
    options = WorkerOptions(workers=workers, gpus_per_worker=gpus_per_worker)
    journal = start_journal(recipe, store=place, source=source, run=run, workers=workers)
    this = Run(Job(recipe, place, source, options, run, ranks, Listing(), anew), journal)
    with journal.kept(), session(Settings().ray_address, max(workers, ranks)):
        made = tasks.walk(this)
        report = made["report"]
        journal.publish_report(manifest_of(place, made["evaluate"]), report)
    _show_in_prefect(place, journal.record, report)
    return journal.record


def _show_in_prefect(store: Store, record: RunRecord, report: ArtifactRef) -> None:
    """The report as artifacts of the flow run; the run is over and well even if the server will not have them."""
    key = f"report-{record.recipe.name.lower().replace('_', '-')}"
    table = [dict(zip(("stage", "state", "seconds", "artifact"), row, strict=True)) for row in stage_rows(record)]
    page = store.at("artifacts", report.kind, report.digest)
    try:
        create_table_artifact(table, key=f"{key}-stages", description=f"Stages of {record.run}")
        create_table_artifact([{"metric": k, "value": v} for k, v in record.metrics.items()], key=f"{key}-metrics")
        if record.report is not None:
            link = record.report if "://" in record.report else f"file://{record.report}"
            create_link_artifact(link, link_text="report page", key=f"{key}-page")
        if page.exists("report.md"):
            create_markdown_artifact(page.read("report.md").decode(), key=f"{key}-text")
    except httpx.HTTPError as error:
        log.warning("the report is not in Prefect: %s", error)
