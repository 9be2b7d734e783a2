"""All stages, and how one is run.

Here and in the stages_* beside it is the only place that knows the libraries' argument lists. Heavy imports happen
inside the calls, so that the command line starts fast.
"""

import functools

from flows.stage import Job, Result, Stage, Work
from flows.stages_generator import SAMPLE, TRAIN_GENERATOR
from flows.stages_images import ENCODE, PREPARE
from flows.stages_report import EVALUATE, REPORT
from flows.stages_tokenizer import ALIGN, FINE_TUNE, TEACHER, WARM_UP
from infra.artifacts import Plan
from infra.progress import Progress
from infra.ranks import Ranks, run_ranks
from infra.store import Store

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

STAGES = {
    stage.name: stage
    for stage in (PREPARE, TEACHER, WARM_UP, ALIGN, FINE_TUNE, ENCODE, TRAIN_GENERATOR, SAMPLE, EVALUATE, REPORT)
}


def run(stage: Stage, work: Work) -> Result:
    """Make the artifact's files in `work.out`; nothing is published yet."""
    if not stage.is_trained or work.job.ranks == 1:
        return stage.call(work)
    this = functools.partial(_in_rank, stage.name, work.job, work.plan, work.out)
    return run_ranks(this, work.job.ranks, progress=work.progress)


def _in_rank(name: str, job: Job, plan: Plan, out: Store, ranks: Ranks, progress: Progress) -> Result:
    return STAGES[name].call(Work(job, plan, out, progress, ranks))
