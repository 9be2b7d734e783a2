"""The flow that trains a generator on codes that are there already."""

from typing import Annotated

from prefect import flow
from pydantic import Field

from flows.pipeline import tasks
from flows.pipeline.tasks import Run
from flows.recipes.schema import Recipe
from flows.runs.journal import RunRecord, start_journal
from flows.stage import Job
from infra.artifacts.lineage import find_artifact
from infra.compute.cluster import session
from infra.compute.workers import WorkerOptions
from infra.settings import Settings


@flow(name="train-generator", flow_run_name="{run}", persist_result=False)
def train_on_codes(
    recipe: Annotated[Recipe, Field(description="whose generator and training are meant")],
    *,
    run: Annotated[str, Field(description="name of this run, unique in the store")],
    store: Annotated[str, Field(description="folder or s3://bucket/prefix that artifacts are kept in")],
    codes: Annotated[str, Field(description="the code dataset, as kind/digest or its beginning")],
    ranks: Annotated[int, Field(ge=1, description="training processes, which share a step's micro-batches")] = 1,
) -> RunRecord:
    """Train a generator, unless the store has what these settings make of these codes."""
    found = find_artifact(codes, store, "codes")
    journal = start_journal(recipe, store=found.store, source=str(found.ref), run=run, workers=0)
    this = Run(Job(recipe, found.store, str(found.ref), WorkerOptions(), run, ranks), journal)
    with journal.kept(), session(Settings().ray_address, ranks):
        tasks.walk(this, last="train_generator", given={"encode": found.ref})
    return journal.record
