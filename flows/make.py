"""Find an artifact in the store, or make it and publish it: the one place where this is decided.

Nothing here knows Prefect: the pipeline's tasks wrap `make`, and commands call it, or `find_or_publish`, themselves.
"""

import functools
import time
from collections.abc import Callable
from typing import Literal

from flows.stage import CPU, Refs, Result, Stage, StageJob, Work, plan_of
from infra.artifacts.artifact import Artifact
from infra.artifacts.made_on import record_device
from infra.artifacts.manifest import ArtifactPlan, folder_of, publish
from infra.compute.device import IEEE, device_facts, use_numerics
from infra.compute.rank_count import ONE
from infra.compute.ranks import Ranks, run_ranks
from infra.progress import Progress, silent
from infra.store.store import Store
from infra.training.checkpoint import CHECKPOINTS, Checkpoints

State = Literal["Cached", "Completed"]

# Share of a GPU that the process which measures reserves: it is placed where one is, and leaves its workers the rest.
MEASURING = 0.01


def make(stage: Stage, job: StageJob, inputs: Refs, *, progress: Progress = silent) -> tuple[Artifact, State]:
    """Return what a stage makes of its inputs, and whether it was cached; what is published is complete or not there.

    Args:
        stage: what is to be done.
        job: where it is read and written, and how wide the stage runs.
        inputs: the artifacts that it is made of, by name.
        progress: called while it is made.
    """
    job = job.settled()
    plan = plan_of(stage, job, inputs)

    def call(out: Store) -> Result:
        return run_stage(stage, Work(job, plan, out, progress))

    artifact, state = find_or_publish(job.store, plan, call)
    if state == "Completed":
        Checkpoints(artifact.folder.at(CHECKPOINTS)).clear()  # nothing will resume a stage that is done
    if stage.accept is not None:
        stage.accept(job, artifact.manifest)
    return artifact, state


def find_or_publish(store: Store, plan: ArtifactPlan, write: Callable[[Store], Result]) -> tuple[Artifact, State]:
    """Return what a plan makes, and whether it was cached; if not, it is written into its folder and published.

    Args:
        store: where it is kept.
        plan: what identifies it.
        write: writes its files into the folder that it is given; called only if the artifact is not there.

    Raises:
        ValueError: the artifact is damaged, or what was written is not there as listed.
    """
    if (found := Artifact.find(store, plan)) is not None:
        return found, "Cached"
    began = time.monotonic()
    made = write(folder_of(store, plan.kind, plan.digest))
    manifest = publish(
        store,
        plan,
        files=made.files,
        counts=made.counts,
        metrics=made.metrics,
        seconds=time.monotonic() - began,
        content_digest=made.content_digest,
        pages=made.pages,
    )
    return Artifact(store, manifest), "Completed"


def run_stage(stage: Stage, work: Work) -> Result:
    """Make the artifact's files in `work.out`; nothing is published yet.

    What is trained or measured on a GPU has a process of its own, which leaves the card empty for the next stage.
    """
    if not (stage.is_trained or stage.is_measured):
        return stage.call(work)
    job = work.job
    if stage.is_measured and job.device != CPU and job.workers.gpus_per_worker:
        left = max(job.workers.gpus_per_worker - MEASURING, MEASURING)
        job = job._replace(workers=job.workers.model_copy(update={"gpus_per_worker": left}))
    this = functools.partial(_in_process, stage, job, work.plan, work.out)
    gpus = 0.0 if job.device == CPU else 1.0 if stage.is_trained else MEASURING
    return run_ranks(this, job.ranks if stage.is_trained else ONE, gpus=gpus, progress=work.progress)


def _in_process(
    stage: Stage, job: StageJob, plan: ArtifactPlan, out: Store, ranks: Ranks, progress: Progress
) -> Result:
    numerics = IEEE if stage.is_measured else job.recipe.compute.numerics
    use_numerics(numerics, job.device)
    record_device(out, device_facts(job.device, numerics))
    return stage.call(Work(job, plan, out, progress, ranks))
