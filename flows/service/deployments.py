"""The deployed flows: what a schedule or a person in Prefect starts, without naming a run.

| flow | does | schedule by default (UTC) | ends as |
|---|---|---|---|
| `full-pipeline` | all stages of a recipe | Sundays 03:00 | Completed, or Cached: nothing had changed |
| `retokenize` | prepare and encode with a tokenizer of the store | on demand | Completed, or Cached |
| `check-data` | lists the images, starts `retokenize` if they have changed | daily 01:00 | Changed, Cached, Skipped |
| `benchmark-report` | measures the last run against an earlier one | nightly 05:00 | Completed, or Failed: the gate |

A run is named by the time and the recipe; in Prefect and in the store it has the same name. Before anything begins it
is checked like one of the command line, dead runs are marked (`flows.service.liveness`), and it waits for its turn
(`flows.service.concurrency`). Failures are told to the block of SFTOK_NOTIFY (`flows.service.notify`).
"""

import importlib.util
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import FlowRun, State
from prefect.context import FlowRunContext
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Completed

from flows.pipeline.encode import retokenize as retokenize_flow
from flows.pipeline.full import full_pipeline
from flows.pipeline.tasks import timeout_of
from flows.requests.checks import check_request
from flows.requests.encode import check_encode_request
from flows.runs.history import PastRun, is_evaluated, latest, records
from flows.runs.journal import RunRecord, new_run_id
from flows.service import concurrency, data_watch, liveness, notify
from flows.service.notify import GateFailedError
from flows.service.parameters import (
    BenchmarkParameters,
    CheckDataParameters,
    PipelineParameters,
    RetokenizeParameters,
    plain,
)
from infra.settings import Settings
from infra.store.store import Store


def _run_name() -> str:
    """The name of the run that begins: Prefect asks before it calls the flow."""
    from prefect.runtime import flow_run

    given = flow_run.parameters.get("parameters")
    given = given if isinstance(given, Mapping) else given.model_dump()
    return new_run_id(plain(str(given.get("recipe") or "run")))


def _named(prefix: str) -> Any:
    return lambda: new_run_id(prefix)


HOOKS: dict[str, Any] = {"on_failure": [notify.failed], "on_crashed": [notify.crashed], "persist_result": False}


@flow(name="full-pipeline", flow_run_name=_run_name, **HOOKS)
def pipeline(parameters: PipelineParameters) -> State[Any]:
    """Run a recipe from images to report; what is done already is found, not repeated."""
    request = check_request(
        parameters.recipe,
        data=parameters.data,
        store=parameters.store,
        overrides=parameters.overrides,
        workers=parameters.workers,
        ranks=parameters.ranks,
        seed=parameters.seed,
        gpus=parameters.gpus_per_worker,
    )
    run = _begin(request.store)
    gpus = concurrency.gpus_of(workers=request.workers, gpus_per_worker=request.gpus_per_worker, ranks=request.ranks)
    try:
        with concurrency.held(request.recipe.name, request.store, overlap=parameters.overlap, gpus=gpus):
            record = full_pipeline.fn(  # in this flow run: one run, one name
                request.recipe,
                run=run,
                store=request.store.uri,
                source=request.source,
                workers=request.workers,
                ranks=request.ranks,
                gpus_per_worker=request.gpus_per_worker,
            )
    except concurrency.OverlapError as error:
        return Cancelled(message=str(error))
    return _ended(record)


@flow(name="retokenize", flow_run_name=_named("retokenize"), **HOOKS)
def retokenize(parameters: RetokenizeParameters) -> State[Any]:
    """Encode a dataset with a tokenizer that is there; of one that was encoded before, only what changed."""
    wanted = data_watch.wanted_of(parameters)
    request = check_encode_request(
        wanted.encode,
        tokenizer=wanted.tokenizer,
        data=wanted.data,
        store=wanted.store.uri,
        overrides=wanted.overrides,
        workers=parameters.workers,
        gpus_per_worker=parameters.gpus_per_worker or None,
    )
    run = _begin(wanted.store)
    options = request.options
    gpus = concurrency.gpus_of(workers=options.workers, gpus_per_worker=options.gpus_per_worker)
    try:
        with concurrency.held(
            f"retokenize-{plain(parameters.recipe)}", wanted.store, overlap=parameters.overlap, gpus=gpus
        ):
            record = retokenize_flow.fn(
                wanted.encode,
                run=run,
                store=wanted.store.uri,
                tokenizer=wanted.tokenizer,
                data=wanted.data,
                overrides=request.settled(wanted.overrides),
                workers=options.workers,
                gpus_per_worker=options.gpus_per_worker,
            )
    except concurrency.OverlapError as error:
        return Cancelled(message=str(error))
    return _ended(record)


@flow(name="check-data", flow_run_name=_named("check-data"), **HOOKS)
def check_data(parameters: CheckDataParameters) -> State[Any]:
    """List the images once, and start a re-tokenization if they have changed since they were encoded."""
    place = Store(parameters.retokenize.store or Settings().store)
    _begin(place)
    recipe = parameters.retokenize.recipe
    if parameters.retokenize.tokenizer is None and data_watch.last_tokenizer(place, recipe) is None:
        return Completed(name="Skipped", message=f"no run of recipe {recipe} has made a tokenizer in {place.uri} yet")
    verdict = data_watch.look(data_watch.wanted_of(parameters.retokenize))
    if not verdict.changed:
        return Completed(name="Cached", message=f"{verdict.reason}; {verdict.images} listed")
    try:
        started = run_deployment(
            parameters.deployment,
            parameters={"parameters": parameters.retokenize.as_json()},
            timeout=0,
            as_subflow=False,
        )
    except ObjectNotFound as error:
        raise ValueError(
            f"deployment = {parameters.deployment}: Prefect has none of this name; name one as FLOW/NAME, such as "
            "retokenize/retokenize"
        ) from error
    assert isinstance(started, FlowRun)  # it is a coroutine in an async flow only
    return Completed(name="Changed", message=f"{verdict.reason}; started {parameters.deployment} as {started.id}")


@flow(name="benchmark-report", flow_run_name=_named("benchmark"), **HOOKS)
def benchmark_report(parameters: BenchmarkParameters) -> State[Any]:
    """Measure a run, report it against an earlier one, and fail if a figure became worse than it may.

    One that was not evaluated is gone on with, as soon as no other run of its recipe is under way.
    """
    from flows.service import benchmark

    place = Store(parameters.store or Settings().store)
    _begin(place)
    found = records(place)
    if not found:
        return Completed(name="Skipped", message=f"there are no runs in {place.uri} yet")
    run = parameters.run or _to_measure(found)
    gate = parameters.gate and any(one.run == run and _has_gate(one) for one in found)
    unfinished = next((one for one in found if one.run == run and not is_evaluated(one)), None)
    try:
        with concurrency.held(unfinished.recipe.name, place, overlap="wait") if unfinished else nullcontext():
            made = benchmark.benchmark.fn(run=run, store=place.uri, against=parameters.against, gate=gate)
    except benchmark.GateFailedError as error:
        raise GateFailedError(str(error)) from error
    asked = "the gate is passed" if gate else "no gate was asked"
    return Completed(message=f"measured {made.run} against {made.against or 'nothing'}; {asked}")


def _to_measure(found: Sequence[PastRun]) -> str:
    """The last run; while that one is under way, the last one that has figures, if any has."""
    evaluated = latest(found)
    return evaluated.run if evaluated is not None and found[-1].state == "Running" else found[-1].run


def _has_gate(run: PastRun) -> bool:
    gate = run.recipe.model_dump().get("gate") or {}
    return bool(gate.get("thresholds"))


def has_benchmark() -> bool:
    """Whether there is a benchmark to deploy."""
    return importlib.util.find_spec("flows.service.benchmark") is not None


def _begin(store: Store) -> str:
    """Sign in with Prefect, mark what is dead, refuse time-outs that name no stage; the run's name."""
    context = FlowRunContext.get()
    assert context is not None
    assert context.flow_run is not None
    liveness.sign_in(context.flow_run)
    timeout_of("prepare")
    liveness.mark([store])
    return context.flow_run.name


def _ended(record: RunRecord) -> State[Any]:
    """Completed, or Cached if every stage was found."""
    where = f"; report {record.report}" if record.report else ""
    made = [name for name, stage in record.stages.items() if stage.state != "Cached"]
    if made:
        return Completed(message=f"made {', '.join(made)}; found the other {len(record.stages) - len(made)}{where}")
    return Completed(name="Cached", message=f"nothing changed: all {len(record.stages)} stages were found{where}")
