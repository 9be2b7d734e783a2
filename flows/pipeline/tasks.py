"""Run stages as Prefect tasks, one per stage, with retries: find the artifact, or make and publish it.

A stage whose manifest exists ends in the state `Cached`. Prefect's own cache and results stay out of it: the manifest
decides.
"""

import asyncio
import contextlib
import errno
import inspect
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import httpx
from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.states import Completed
from prefect.tasks import Task, exponential_backoff

from flows.make import make
from flows.pipeline import graph
from flows.pipeline.space import check_space
from flows.pipeline.watch import Watch
from flows.runs import progress
from flows.runs.journal import Journal, one_line, start_journal
from flows.runs.run_request import RunRequest
from flows.stage import Listing, Stage, StageJob
from infra.artifacts.manifest import ArtifactRef
from infra.settings import ALL_STAGES, Settings

RETRIES = 3
BACKOFF_SECONDS = 2.0  # then 4, then 8, each with jitter

# What a network or a cluster does to a call that would otherwise succeed. ENOSPC, EACCES and the like need a person.
_PASSING_ERRNOS = frozenset(
    {errno.EBUSY, errno.EIO, errno.EPIPE, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH}
)

Made = dict[str, ArtifactRef]  # by stage

log = logging.getLogger(__name__)


class RunContext(NamedTuple):
    """The job and the journal that all tasks of a run share."""

    job: StageJob
    journal: Journal

    @classmethod
    def of(cls, request: RunRequest, run: str) -> "RunContext":
        """Begin the run of a request."""
        stages = {stage.name for stage in graph.GRAPH.order(request.recipe, last=request.last, given=request.given)}
        stages |= {"ablation_arm"} if request.ablation else set()
        job = StageJob.of(request, run, listing=Listing())._replace(stages=frozenset(stages))
        return cls(job, start_journal(request, run))


def is_infrastructure_error(error: BaseException) -> bool:
    """Return whether a retry may help: connections, time-outs, lost workers; never a mistake of the caller."""
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
    """Decide, for Prefect, whether a failed attempt is retried, and log it if so."""
    error = state.data  # Prefect hands the exception itself over
    if not isinstance(error, BaseException) or not is_infrastructure_error(error):
        return False
    log.warning("%s: attempt %d failed, trying again: %s", task_run.name, task_run.run_count, one_line(error))
    return True


def walk(run: RunContext, *, last: str | None = None, given: Mapping[str, ArtifactRef] | None = None) -> Made:
    """Run the graph's stages that lead to `last`, or all; return artifacts by stage, those `given` among them."""
    made = dict(given or {})
    recipe = run.job.recipe
    order = graph.GRAPH.order(recipe, last=last, given=made)
    if graph.PREPARE in order:  # it asks for the room of all stages itself
        order.remove(graph.PREPARE)
        made[graph.PREPARE.name] = run_task(graph.PREPARE, run, {})
    check_space(run.job, order, made)
    for stage in order:
        made[stage.name] = run_task(stage, run, {name: made[of] for name, of in stage.inputs(recipe).items()})
    return made


def run_task(stage: Stage, run: RunContext, inputs: Mapping[str, ArtifactRef]) -> ArtifactRef:
    """Run a stage as a Prefect task of its name, whose state says whether the artifact was made or found."""
    # Prefect draws a parameter's name at the edge between two tasks. Arms of an ablation are no names of parameters.
    names = {name if name.isidentifier() else f"input_{at}": name for at, name in enumerate(inputs)}

    def attempt(**refs: ArtifactRef) -> State[ArtifactRef]:
        return find_or_make(stage, run, {names[key]: ref for key, ref in refs.items()})

    parameters = [inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY) for key in names]
    attempt.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    retried = task(
        name=stage.name,
        task_run_name=stage.name,
        retries=RETRIES,
        retry_delay_seconds=exponential_backoff(BACKOFF_SECONDS),
        retry_jitter_factor=0.5,
        retry_condition_fn=retry_if_infrastructure,
        timeout_seconds=timeout_of(stage.name),
        cache_policy=NO_CACHE,
        persist_result=False,
    )(attempt)
    ended = retried(**{key: inputs[name] for key, name in names.items()}, return_state=True)
    ref = ended.result()  # raises what the task raised
    assert isinstance(ref, ArtifactRef)  # Prefect's types miss that a returned state becomes the task's own
    return ref


def timeout_of(stage: str) -> float | None:
    """Return the time-out of an attempt at a stage in seconds, if it has one (SFTOK_STAGE_TIMEOUTS).

    Raises:
        ValueError: a time-out is given for something that is no stage.
    """
    given = Settings().stage_timeouts
    if unknown := sorted(set(given) - {*graph.GRAPH, ALL_STAGES}):
        raise ValueError(f"SFTOK_STAGE_TIMEOUTS: {unknown[0]!r} is no stage; the stages are {', '.join(graph.GRAPH)}")
    return given.get(stage, given.get(ALL_STAGES))


def find_or_make(stage: Stage, run: RunContext, inputs: Mapping[str, ArtifactRef]) -> State[ArtifactRef]:
    """Attempt a stage and journal how it went; what it publishes is complete or not there."""
    run.journal.begin(stage.name)
    watch = Watch(stage, run.job, inputs, run.journal)
    try:
        with progress.of_stage(stage.name, watch) as listen:
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
    watch.end(artifact, is_new=state == "Completed")
    progress.display().line(f"{stage.name}: {state} in {record.seconds:.1f} s")
    return Completed(name=state, message=str(ref), data=ref)
