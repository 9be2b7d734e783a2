"""Mark runs as crashed that say they are running and are not: their process was killed, or the power was.

Two places tell of a run. Its record in the store is marked Crashed when its writer is known to be gone: a process of
this machine that does not exist any more, or a run that Prefect knows to have ended. Prefect's flow run is marked when
its process is gone here, or when it was alive on another machine and has been silent for `SILENT_SECONDS`. What such a
run has published stays; the command in the reason resumes from there.

This looks once, when something starts; `flows.prefect_server.heartbeat` is what watches meanwhile.
"""

import json
import logging
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import httpx
import psutil
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterName,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.events.filters import EventFilter, EventNameFilter, EventOccurredFilter, EventResourceFilter
from prefect.states import Crashed
from pydantic import ValidationError

from flows.prefect_server.heartbeat import BEAT
from flows.runs.journal import RunRecord, Writer, one_line, this_process
from flows.service import notify
from infra.store.store import Store

FLOWS = (*notify.MODELS, "train-generator", "ablation")  # the last two are started by hand only
SILENT_SECONDS = 600.0  # more than three signs of life of whoever gives one at Prefect's default of 180 s
READERS = 16
RECENT = 200  # runs whose records are looked at: names begin with the time, and what is older was seen before

Record = dict[str, Any]  # a run's record as JSON

log = logging.getLogger(__name__)


class MarkedRuns(NamedTuple):
    """The runs that were found dead and marked."""

    records: tuple[str, ...]
    flow_runs: tuple[str, ...]


class CrashedRun(NamedTuple):
    """A dead run whose record was marked as crashed."""

    run: str
    stage: str
    reason: str


def mark(stores: Sequence[Store]) -> MarkedRuns:
    """Mark dead runs in these stores and in Prefect, and send notifications."""
    dead = {one.run: one for store in stores for one in mark_records(store, ended=_ended)}
    return MarkedRuns(tuple(dead), tuple(mark_flow_runs(dead)))


# --- records in the store --------------------------------------------------------------------------------------------


def mark_records(store: Store, *, ended: Callable[[str], bool] | None = None) -> list[CrashedRun]:
    """Mark the records in the state Running whose writer is gone, and return those runs.

    Args:
        store: where the records are.
        ended: whether a run of another machine is known to have ended; without it those are left alone.
    """
    with ThreadPoolExecutor(READERS) as pool:
        recent = sorted(store.at("runs").folders())[-RECENT:]
        found = list(pool.map(lambda name: _running(store, name), recent))
    marked = []
    for record in found:
        writer = _writer(record)
        if record is None or writer is None:
            continue
        here = is_gone(writer)
        if here or (here is None and ended is not None and ended(str(record["run"]))):
            marked.append(_crash(store, record, writer))
    return marked


def is_gone(writer: Writer) -> bool | None:
    """Return whether a process is gone; None if it is of another machine, so nobody here knows."""
    if writer.host != socket.gethostname():
        return None
    try:
        return abs(psutil.Process(writer.pid).create_time() - writer.began) > 2.0  # another one of the same number
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False


def _running(store: Store, name: str) -> Record | None:
    """Read a record in the state Running as plain JSON, so that one of an earlier version is marked, too."""
    try:
        record = json.loads(store.at("runs", name).read("run.json"))
    except (FileNotFoundError, ValueError):  # somebody else's to complain about
        return None
    return record if isinstance(record, dict) and record.get("state") == "Running" else None


def _writer(record: Record | None) -> Writer | None:
    try:
        return Writer.model_validate((record or {}).get("writer"))
    except ValidationError:
        return None


def _crash(store: Store, record: Record, writer: Writer) -> CrashedRun:
    run, stages = str(record["run"]), record.get("stages", {})
    running = [name for name, stage in stages.items() if stage.get("state") == "Running"]
    dead = CrashedRun(run, running[-1] if running else "run", f"process {writer.pid} of {writer.host} is gone")
    reason = f"{dead.stage}: {dead.reason}; resume with: {_command(record)}"
    for name in running:
        stages[name] |= {"state": "Crashed", "reason": dead.reason}
    crashed = {**record, "state": "Crashed", "reason": reason, "stages": stages}
    store.at("runs", run).write("run.json", json.dumps(crashed, indent=2).encode())
    log.warning("run %s has crashed: %s", run, reason)
    return dead


def _command(record: Record) -> str:
    """Return the command that resumes a run."""
    try:
        return RunRecord.model_validate(record).command(str(record["run"]))
    except ValidationError:  # of another version
        file = f"{record['store']}/runs/{record['run']}/run.json"
        return f"sftok run with the recipe that it was started with: {file} has it"


# --- flow runs in Prefect --------------------------------------------------------------------------------------------


def sign_in(flow_run: FlowRun) -> None:
    """Note in Prefect which process executes a flow run; a server that does not take it costs only the note."""
    writer = this_process()
    try:
        with get_client(sync_client=True) as client:
            client.update_flow_run_labels(
                flow_run.id, {"sftok.host": writer.host, "sftok.pid": writer.pid, "sftok.began": writer.began}
            )
    except httpx.HTTPError as error:
        log.warning("Prefect does not know which process this run is: %s", one_line(error))


def mark_flow_runs(dead: Mapping[str, CrashedRun]) -> list[str]:
    """Mark flow runs of ours in the state Running whose process is gone; `dead` are those that a store told of."""
    marked = []
    with get_client(sync_client=True) as client:
        for flow_run, flow in _running_flow_runs(client):
            known = dead.get(flow_run.name)
            reason = known.reason if known else _why_dead(client, flow_run)
            if reason is None:
                continue
            client.set_flow_run_state(flow_run.id, Crashed(message=reason), force=True)
            log.warning("flow run %s has crashed: %s", flow_run.name, reason)
            command = notify.command_of(flow, flow_run.parameters)
            stage = known.stage if known else "run"
            notify.send(notify.Message(flow_run.name, "crashed", stage, reason, command))
            marked.append(flow_run.name)
    return marked


def _running_flow_runs(client: SyncPrefectClient) -> Iterator[tuple[FlowRun, str]]:
    for flow in FLOWS:
        found = client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=[flow])),
            flow_run_filter=FlowRunFilter(
                state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.RUNNING]))
            ),
            limit=200,
        )
        yield from ((flow_run, flow) for flow_run in found)


def _why_dead(client: SyncPrefectClient, flow_run: FlowRun) -> str | None:
    writer = writer_of(flow_run)
    gone = is_gone(writer) if writer else None
    if writer and gone:
        return f"process {writer.pid} of {writer.host} is gone"
    if gone is None and (beat := _last_beat(client, flow_run)) is not None:
        silent = (datetime.now(UTC) - beat).total_seconds()
        if silent > SILENT_SECONDS:
            return f"no sign of life for {silent:.0f} s{f' from {writer.host}' if writer else ''}"
    return None


def writer_of(flow_run: FlowRun) -> Writer | None:
    """Return the process that signed in for a flow run."""
    labels = flow_run.labels
    if "sftok.host" not in labels:
        return None
    return Writer(host=str(labels["sftok.host"]), pid=int(labels["sftok.pid"]), began=float(labels["sftok.began"]))


def _last_beat(client: SyncPrefectClient, flow_run: FlowRun) -> datetime | None:
    wanted = EventFilter(
        occurred=EventOccurredFilter(since=datetime.now(UTC) - timedelta(days=7)),
        event=EventNameFilter(name=[BEAT]),
        resource=EventResourceFilter(id=[f"prefect.flow-run.{flow_run.id}"]),
    )
    events = client.read_events(wanted, limit=1).events
    return events[0].occurred if events else None


def _ended(run: str) -> bool:
    """Return whether Prefect knows a run of this name, and that it has ended."""
    with get_client(sync_client=True) as client:
        found = client.read_flow_runs(flow_run_filter=FlowRunFilter(name=FlowRunFilterName(any_=[run])), limit=5)
    return bool(found) and all(one.state is not None and one.state.is_final() for one in found)
