"""The flow that turns images into codes with a tokenizer that is there already: prepare, then encode."""

from collections.abc import Sequence
from typing import Annotated

from prefect import flow
from pydantic import Field

from flows.pipeline import tasks
from flows.pipeline.tasks import Run
from flows.recipes.schema import EncodeConfig
from flows.requests.encode import find_dataset
from flows.runs.journal import RunRecord, start_journal
from flows.stage import Job, Listing
from infra.compute.cluster import session
from infra.compute.workers import WorkerOptions
from infra.settings import Settings


@flow(name="retokenize", flow_run_name="{run}", persist_result=False)
def retokenize(
    encode: Annotated[EncodeConfig, Field(description="how images are encoded")],
    *,
    run: Annotated[str, Field(description="name of this run, unique in the store")],
    store: Annotated[str, Field(description="folder or s3://bucket/prefix that artifacts are kept in")],
    tokenizer: Annotated[str, Field(description="the tokenizer artifact, as kind/digest or its beginning")],
    data: Annotated[str, Field(description="images: what `sftok run --data` takes, or images/DIGEST of the store")],
    overrides: Annotated[Sequence[str], Field(description="section.field=value of data and augment")] = (),
    workers: Annotated[int, Field(ge=0, description="Ray workers; 0 does everything in one process")] = 2,
    gpus_per_worker: Annotated[float, Field(ge=0, description="GPUs a worker; 0.5 lets two share one")] = 0.0,
    anew: Annotated[bool, Field(description="give up shards that another kind of device began")] = False,
) -> RunRecord:
    """Encode a dataset; of one that was encoded before in another version, only the shards that changed."""
    wanted = find_dataset(encode, tokenizer=tokenizer, data=data, store=store, overrides=overrides)
    options = WorkerOptions(workers=workers, gpus_per_worker=gpus_per_worker)
    journal = start_journal(wanted.recipe, store=wanted.store, source=data, run=run, workers=workers)
    this = Run(Job(wanted.recipe, wanted.store, data, options, run, listing=Listing(), anew=anew), journal)
    with journal.kept(), session(Settings().ray_address, workers):
        given = {"fine_tune": wanted.tokenizer} | ({"prepare": wanted.images} if wanted.images else {})
        tasks.walk(this, last="encode", given=given)
    return journal.record
