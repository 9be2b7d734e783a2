"""One retryable task a stage: look for the artifact, else make and publish it.

A stage whose manifest exists ends in the state `Cached`. Prefect's own cache and results stay out of it: the manifest
decides.
"""

import asyncio
import contextlib
import errno
import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec

import httpx
from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.states import Completed
from prefect.tasks import Task, exponential_backoff

from flows.make import make
from flows.pipeline import graph
from flows.runs import progress
from flows.runs.journal import Journal, one_line
from flows.stage import Job, Stage
from infra.artifacts.manifest import ArtifactRef
from infra.settings import ALL_STAGES, Settings

RETRIES = 3
BACKOFF_SECONDS = 2.0  # then 4, then 8, each with jitter

# What a network or a cluster does to a call that would otherwise succeed. ENOSPC, EACCES and the like need a person.
_PASSING_ERRNOS = frozenset(
    {errno.EBUSY, errno.EIO, errno.EPIPE, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH}
)

P = ParamSpec("P")

log = logging.getLogger(__name__)


class Run(NamedTuple):
    """What every task of one run shares."""

    job: Job
    journal: Journal


def is_infrastructure_error(error: BaseException) -> bool:
    """Whether trying again later may help: connections, time-outs, lost workers; never a mistake of the caller."""
    import aiohttp
    import botocore.exceptions

    connection_errors = (
        ConnectionError,  # lost Ray workers are one, too
        TimeoutError,
        aiohttp.ClientConnectionError,
        aiohttp.ClientPayloadError,
        botocore.exceptions.ConnectionError,
        botocore.exceptions.HTTPClientError,
        httpx.TransportError,
    )
    if isinstance(error, connection_errors):
        return True
    return isinstance(error, OSError) and error.errno in _PASSING_ERRNOS


def retry_if_infrastructure(_task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Prefect's question after a failed attempt; says aloud that there will be another one."""
    error = state.data  # Prefect hands the exception itself over
    if not isinstance(error, BaseException) or not is_infrastructure_error(error):
        return False
    log.warning("%s: attempt %d failed, trying again: %s", task_run.name, task_run.run_count, one_line(error))
    return True


def stage_task(attempt: Callable[P, State[ArtifactRef]]) -> Callable[P, ArtifactRef]:
    """A Prefect task that returns a ref, and whose state says whether the artifact was made or found."""
    name = attempt.__name__
    retried = task(
        name=name,
        task_run_name=name,
        retries=RETRIES,
        retry_delay_seconds=exponential_backoff(BACKOFF_SECONDS),
        retry_jitter_factor=0.5,
        retry_condition_fn=retry_if_infrastructure,
        cache_policy=NO_CACHE,
        persist_result=False,
    )(attempt)

    @functools.wraps(attempt)
    def call(*args: P.args, **kwargs: P.kwargs) -> ArtifactRef:
        seconds = timeout_of(name)
        timed = retried if seconds is None else retried.with_options(timeout_seconds=seconds)
        ref = timed(*args, **kwargs, return_state=True).result()  # raises what the task raised
        assert isinstance(ref, ArtifactRef)  # Prefect's types miss that a returned state becomes the task's own
        return ref

    return call


def timeout_of(stage: str) -> float | None:
    """Seconds that an attempt at a stage may take, if it is limited (SFTOK_STAGE_TIMEOUTS).

    Raises:
        ValueError: a time-out is given for something that is no stage.
    """
    given = Settings().stage_timeouts
    if unknown := sorted(set(given) - {*graph.STAGES, ALL_STAGES}):
        raise ValueError(f"SFTOK_STAGE_TIMEOUTS: {unknown[0]!r} is no stage; the stages are {', '.join(graph.STAGES)}")
    return given.get(stage, given.get(ALL_STAGES))


def find_or_make(stage: Stage, run: Run, **inputs: ArtifactRef) -> State[ArtifactRef]:
    """One attempt at a stage; what it publishes is complete or not there."""
    run.journal.begin(stage.name)
    try:
        with progress.of_stage(stage.name) as listen:
            artifact, state = make(stage, run.job, inputs, progress=listen)
    except Exception as error:
        with contextlib.suppress(OSError):  # a store that is full or away takes no record of it either
            run.journal.end(stage.name, "Failed", reason=one_line(error))
        raise
    except asyncio.CancelledError:  # how Prefect ends an attempt whose time is up; SIGTERM and Ctrl-C are others
        run.journal.end(stage.name, "Failed", reason=f"not done within {timeout_of(stage.name):g} s")
        raise
    ref = artifact.ref
    record = run.journal.end(stage.name, state, ref=ref)
    progress.display().line(f"{stage.name}: {state} in {record.seconds:.1f} s")
    return Completed(name=state, message=str(ref), data=ref)


@stage_task
def prepare(run: Run) -> State[ArtifactRef]:
    """Images and rejects of the source."""
    return find_or_make(graph.PREPARE, run)


@stage_task
def teacher(run: Run, *, images: ArtifactRef) -> State[ArtifactRef]:
    """The teacher whose codes the decoder predicts; an imported one is the same whatever the images."""
    needed = {} if run.job.recipe.teacher.origin == "imported" else {"images": images}
    return find_or_make(graph.TEACHER, run, **needed)


@stage_task
def warm_up(run: Run, *, images: ArtifactRef, teacher: ArtifactRef) -> State[ArtifactRef]:
    """The tokenizer after its first stage: everything masked."""
    return find_or_make(graph.WARM_UP, run, images=images, teacher=teacher)


@stage_task
def align(run: Run, *, images: ArtifactRef, teacher: ArtifactRef, tokenizer: ArtifactRef | None) -> State[ArtifactRef]:
    """The tokenizer after distribution alignment; without a tokenizer to start from, from random weights."""
    start = {"tokenizer": tokenizer} if tokenizer is not None else {}
    return find_or_make(graph.ALIGN, run, images=images, teacher=teacher, **start)


@stage_task
def fine_tune(run: Run, *, images: ArtifactRef, teacher: ArtifactRef, tokenizer: ArtifactRef) -> State[ArtifactRef]:
    """The tokenizer after fine-tuning towards pixels."""
    return find_or_make(graph.FINE_TUNE, run, images=images, teacher=teacher, tokenizer=tokenizer)


@stage_task
def encode(run: Run, *, images: ArtifactRef, tokenizer: ArtifactRef) -> State[ArtifactRef]:
    """The codes of all images."""
    return find_or_make(graph.ENCODE, run, images=images, tokenizer=tokenizer)


@stage_task
def train_generator(run: Run, *, codes: ArtifactRef) -> State[ArtifactRef]:
    """The class-conditional generator of codes."""
    return find_or_make(graph.TRAIN_GENERATOR, run, codes=codes)


@stage_task
def sample(run: Run, *, generator: ArtifactRef) -> State[ArtifactRef]:
    """Codes drawn from the generator."""
    return find_or_make(graph.SAMPLE, run, generator=generator)


@stage_task
def evaluate(
    run: Run,
    *,
    images: ArtifactRef,
    teacher: ArtifactRef,
    tokenizer: ArtifactRef,
    codes: ArtifactRef,
    samples: ArtifactRef,
) -> State[ArtifactRef]:
    """What reconstructions and samples are worth."""
    inputs = {"images": images, "teacher": teacher, "tokenizer": tokenizer, "codes": codes, "samples": samples}
    return find_or_make(graph.EVALUATE, run, **inputs)


@stage_task
def report(run: Run, *, evaluation: ArtifactRef) -> State[ArtifactRef]:
    """The page, its Markdown and its JSON."""
    return find_or_make(graph.REPORT, run, evaluation=evaluation)
