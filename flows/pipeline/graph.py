"""All stages, and how one is run.

Here and in the stages_* beside it is the only place that knows the libraries' argument lists. Heavy imports happen
inside the calls, so that the command line starts fast.
"""

import functools

from flows.pipeline.generator import SAMPLE, TRAIN_GENERATOR
from flows.pipeline.images import ENCODE, PREPARE
from flows.pipeline.judge import EVALUATE, REPORT
from flows.pipeline.tokenizer import ALIGN, FINE_TUNE, TEACHER, WARM_UP
from flows.stage import CPU, Job, Result, Stage, Work
from infra.artifacts.made_on import note
from infra.artifacts.manifest import Plan
from infra.compute.device import IEEE
from infra.compute.ranks import Ranks, run_ranks
from infra.progress import Progress
from infra.store.store import Store

__all__ = [
    "ALIGN",
    "ENCODE",
    "EVALUATE",
    "FINE_TUNE",
    "PREPARE",
    "REPORT",
    "SAMPLE",
    "STAGES",
    "TEACHER",
    "TRAIN_GENERATOR",
    "WARM_UP",
    "run",
]

# Of a GPU, reserved by the process that measures: it is placed where one is, and leaves its workers the rest.
MEASURING = 0.01

STAGES = {
    stage.name: stage
    for stage in (PREPARE, TEACHER, WARM_UP, ALIGN, FINE_TUNE, ENCODE, TRAIN_GENERATOR, SAMPLE, EVALUATE, REPORT)
}


def run(stage: Stage, work: Work) -> Result:
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
    return run_ranks(this, job.ranks if stage.is_trained else 1, gpus=gpus, progress=work.progress)


def _in_process(stage: Stage, job: Job, plan: Plan, out: Store, ranks: Ranks, progress: Progress) -> Result:
    from infra.compute.device import device_facts, use_numerics

    numerics = IEEE if stage.is_measured else job.recipe.compute.numerics
    use_numerics(numerics, job.device)
    note(out, device_facts(job.device, numerics))
    return stage.call(Work(job, plan, out, progress, ranks))
