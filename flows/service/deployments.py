"""The deployed flows, which a schedule or a person in Prefect starts without naming a run.

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

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import FlowRun, State
from prefect.context import FlowRunContext
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Completed

from flows.pipeline.full import run_stages
from flows.pipeline.tasks import timeout_of
from flows.requests.checks import check_request, checked
from flows.runs.history import PastRun, is_evaluated, latest, records
from flows.runs.journal import RunRecord, new_run_id, read_record
from flows.runs.run_request import RunRequest
from flows.service import concurrency, data_watch, liveness, notify
from flows.service.parameters import (
    BenchmarkParameters,
    CheckDataParameters,
    Overlap,
    PipelineParameters,
    RetokenizeParameters,
    plain,
)
from infra.store.store import Store


def _run_name() -> str:
    """Name the run that begins; Prefect asks before it calls the flow."""
    from prefect.runtime import flow_run

    given = flow_run.parameters.get("parameters")
    given = given if isinstance(given, Mapping) else given.model_dump()
    return new_run_id(plain(str(given.get("recipe") or "run")))


def _named(prefix: str) -> Any:
    return lambda: new_run_id(prefix)


HOOKS: dict[str, Any] = {"on_failure": [notify.failed], "on_crashed": [notify.crashed], "persist_result": False}


@flow(name="full-pipeline", flow_run_name=_run_name, **HOOKS)
def pipeline(parameters: PipelineParameters) -> State[Any]:
    """Run a recipe from images to report; stages that are done already are cached."""
    return _execute(check_request(parameters), parameters.overlap)


@flow(name="retokenize", flow_run_name=_named("retokenize"), **HOOKS)
def retokenize(parameters: RetokenizeParameters) -> State[Any]:
    """Encode a dataset with a tokenizer that is there; of one that was encoded before, only what changed."""
    request = checked(data_watch.request_of(parameters))
    return _execute(request, parameters.overlap, limit=f"retokenize-{plain(parameters.recipe)}")


def _execute(request: RunRequest, overlap: Overlap, *, limit: str | None = None) -> State[Any]:
    """Run a request in this flow run, whose name is the run's, as soon as no other run holds its limits."""
    store = Store(request.store)
    run = _begin(store)
    try:
        with concurrency.held(limit or request.limit, store, overlap=overlap, gpus=request.gpus):
            record = run_stages(request, run)
    except concurrency.OverlapError as error:
        return Cancelled(message=str(error))
    return _ended(record)


@flow(name="check-data", flow_run_name=_named("check-data"), **HOOKS)
def check_data(parameters: CheckDataParameters) -> State[Any]:
    """List the images once, and start a re-tokenization if they have changed since they were encoded."""
    place = Store.usual(parameters.retokenize.store)
    _begin(place)
    recipe = parameters.retokenize.recipe
    if parameters.retokenize.tokenizer is None and data_watch.last_tokenizer(place, recipe) is None:
        return Completed(name="Skipped", message=f"no run of recipe {recipe} has made a tokenizer in {place.uri} yet")
    verdict = data_watch.look(data_watch.request_of(parameters.retokenize))
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

    One that was not evaluated is resumed, as soon as no other run of its recipe is under way.
    """
    from flows.service import benchmark

    place = Store.usual(parameters.store)
    _begin(place)
    found = records(place)
    whole = [one for one in found if one.is_whole]
    if not whole:
        return Completed(name="Skipped", message=f"there are no runs in {place.uri} yet")
    run = parameters.run or _to_measure(whole)
    gate = parameters.gate and any(one.run == run and _has_gate(one) for one in found)
    is_unfinished = any(one.run == run and not is_evaluated(one) for one in found)
    with _held_to_finish(run, place) if is_unfinished else nullcontext():
        made = benchmark.measure(run, store=place.uri, against=parameters.against, gate=gate)
    asked = "the gate is passed" if gate else "no gate was asked"
    return Completed(message=f"measured {made.run} against {made.against or 'nothing'}; {asked}")


def _held_to_finish(run: str, store: Store) -> AbstractContextManager[None]:
    request = read_record(store, run).request
    return concurrency.held(request.limit, store, overlap="wait", gpus=request.gpus)


def _to_measure(found: Sequence[PastRun]) -> str:
    """Return the last whole run; while that one is under way, the last one that has figures, if any has."""
    last, evaluated = found[-1], latest(found)
    return evaluated.run if evaluated is not None and last.state == "Running" else last.run


def _has_gate(run: PastRun) -> bool:
    gate = run.recipe.model_dump().get("gate") or {}
    return bool(gate.get("thresholds"))


def _begin(store: Store) -> str:
    """Sign in with Prefect, mark dead runs, refuse time-outs that name no stage; return the run's name."""
    context = FlowRunContext.get()
    assert context is not None
    assert context.flow_run is not None
    liveness.sign_in(context.flow_run)
    timeout_of("prepare")
    liveness.mark([store])
    return context.flow_run.name


def _ended(record: RunRecord) -> State[Any]:
    """Return Completed, or Cached if every stage was cached."""
    where = f"; report {record.report}" if record.report else ""
    made = [name for name, stage in record.stages.items() if stage.state != "Cached"]
    if made:
        return Completed(message=f"made {', '.join(made)}; found the other {len(record.stages) - len(made)}{where}")
    return Completed(name="Cached", message=f"nothing changed: all {len(record.stages)} stages were found{where}")
