"""`sftok serve` for real: schedules fire, runs overlap, processes are killed, and every run ends as it must."""

import json
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows.prefect_server.temporary import prefect_server
from flows.runs import history
from flows.runs.history import PastRun
from infra.artifacts.inventory import manifests
from infra.artifacts.manifest import verify
from infra.store.store import Store
from tests.flows.service.test_schedules import whole_server
from tests.support.serving_process import Serving, until
from tests.support.webhook import save_block, webhook

__all__ = ["whole_server"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def serving(tmp_path: Path, give_database: Callable[[Path], Path]) -> Iterator[Callable[..., Serving]]:
    """Start one, or several after each other; what still runs at the end is stopped."""
    started: list[Serving] = []
    give_database(tmp_path / "home")

    def start(*arguments: str, **environment: str) -> Serving:
        started.append(Serving(tmp_path, arguments=("--pipeline-cron", "off", *arguments), **environment))
        return started[-1].wait()

    yield start
    for one in started:
        if one.process.poll() is None:
            one.kill()


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Any]:
    """Let this process talk to a server, within a block."""
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "client"))
    return lambda url: prefect_server(tmp_path, api_url=url)


def start_run(**changes: Any) -> Any:
    """A run of the deployment, as a click in Prefect starts one."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name("full-pipeline/digits")
        given = {**deployment.parameters["parameters"], **changes}
        return client.create_flow_run_from_deployment(deployment.id, parameters={"parameters": given}).id


def state_of(flow_run_id: Any) -> str:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        return str(client.read_flow_run(flow_run_id).state_name)


def ends(flow_run_id: Any, state: str, patience: float = 120) -> None:
    until(lambda: state_of(flow_run_id) == state, patience, lambda: f"{state_of(flow_run_id)}, not {state}")


def records(store: Path) -> list[PastRun]:
    return history.records(Store(store))


def test_a_schedule_fires_and_a_rerun_is_cached(serving, api) -> None:
    one = serving("--pipeline-cron", "* * * * *")
    until(lambda: len(records(one.store)) > 1 and records(one.store)[1].state == "Completed", 240, one.said)
    first, second = records(one.store)[:2]
    assert {stage.state for stage in first.stages.values()} == {"Completed"}
    assert {stage.state for stage in second.stages.values()} == {"Cached"}
    family = psutil.Process(one.process.pid).children(recursive=True)
    with api(one.url):
        from prefect.client.orchestration import get_client
        from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName

        wanted = FlowRunFilter(name=FlowRunFilterName(any_=[first.run, second.run]))
        with get_client(sync_client=True) as client:
            until(lambda: _names(client, wanted) == {"Completed", "Cached"}, 20, lambda: _names(client, wanted))
            found = client.read_deployment_by_name("retokenize/digits")
            assert [a.name for a in client.read_automations_by_name("sftok-heartbeat")] == ["sftok-heartbeat"]
    assert "RetokenizeParameters" in json.dumps(found.parameter_openapi_schema)
    began = time.monotonic()
    assert one.stop() == 0, one.said()
    assert time.monotonic() - began < 30
    assert not psutil.wait_procs(family, timeout=5)[1], "something was left behind"
    assert "Traceback" not in one.said()


def _names(client: Any, wanted: Any) -> set[str]:
    return {run.state_name for run in client.read_flow_runs(flow_run_filter=wanted)}


def test_a_second_run_waits_or_is_cancelled(serving, api, tmp_path) -> None:
    one = serving("--overlap", "cancel", FAKE_WAIT=f"align:{tmp_path / 'waits'}")
    with api(one.url):
        first = start_run()
        until((tmp_path / "waits").exists, 60, one.said)
        ends(start_run(), "Cancelled")
        assert state_of(first) == "Running"
        began = time.monotonic()
        assert one.stop() == 0
        assert time.monotonic() - began < 30
    assert [record.state for record in records(one.store)] == ["Cancelled"]
    (tmp_path / "waits").unlink()
    other = serving(FAKE_WAIT=f"encode:{tmp_path / 'waits'}")
    with api(other.url):
        first = start_run()
        until((tmp_path / "waits").exists, 60, other.said)
        second = start_run()
        ends(second, "AwaitingConcurrencySlot")
        ends(first, "Completed")  # the fakes wait for a minute
        ends(second, "Cached")


def test_a_killed_run_is_crashed_told_and_gone_on_with(serving, api, tmp_path, whole_server) -> None:
    with webhook() as (url, got), api(whole_server):
        save_block(url)
        joined = {"api_url": whole_server, "SFTOK_NOTIFY": "custom-webhook/ops"}
        one = serving(FAKE_WAIT=f"encode:{tmp_path / 'waits'}", **joined)
        crashed = start_run()
        until((tmp_path / "waits").exists, 60, one.said)
        (child,) = one.children()
        child.kill()
        ends(crashed, "Crashed", 30)
        until(lambda: got, 30, "nobody was told")
        assert "resume: sftok run digits" in got[0]["body"]
        ends(start_run(), "Completed")
        first, second = records(one.store)
        assert (first.state, first.stages["encode"].state) == ("Crashed", "Crashed")  # marked by the second
        assert first.reason.startswith(f"encode: process {child.pid} of ")
        assert [stage.state for stage in second.stages.values()] == ["Cached"] * 5 + ["Completed"] * 6


def test_a_power_loss_is_seen_at_the_next_start(serving, api, tmp_path) -> None:
    one = serving(FAKE_WAIT=f"encode:{tmp_path / 'waits'}")
    with api(one.url):
        crashed = start_run()
        until((tmp_path / "waits").exists, 60, one.said)
    one.kill()
    (record,) = records(one.store)
    assert record.state == "Running", "nobody was there to say otherwise"
    other = serving()
    assert f"run {record.run} had crashed" in other.said()
    with api(other.url):
        assert state_of(crashed) == "Crashed"
        again = start_run()
        ends(again, "Completed", 150)  # the killed run's lease has to end first
    first, second = records(one.store)
    assert first.state == "Crashed"
    assert [stage.state for stage in second.stages.values()] == ["Cached"] * 5 + ["Completed"] * 6


def test_a_lost_machine_is_seen_by_the_server_alone(serving, api, tmp_path, whole_server) -> None:
    """Runner and run are gone, the server is not: its automation crashes the run, and no run that has ended."""
    one = serving(api_url=whole_server, FAKE_WAIT=f"encode:{tmp_path / 'waits'}")
    with api(whole_server):
        lost = start_run()
        until((tmp_path / "waits").exists, 60, one.said)
        time.sleep(32)  # a sign of life
        one.kill()
        ends(lost, "Crashed", 200)
        time.sleep(5)
        assert state_of(lost) == "Crashed"


def test_a_run_that_has_ended_is_left_alone(serving, api, tmp_path, whole_server) -> None:
    one = serving(api_url=whole_server, FAKE_WAIT=f"encode:{tmp_path / 'waits'}")
    with api(whole_server):
        done = start_run()
        ends(done, "Completed")  # after a minute: it has given signs of life
        cached = start_run()
        ends(cached, "Cached")
        time.sleep(150)
        assert (state_of(done), state_of(cached)) == ("Completed", "Cached")
    assert one.stop() == 0


def test_a_taken_port_is_one_line(serving, tmp_path) -> None:
    one = serving()
    other = Serving(tmp_path, arguments=("--port", str(one.port)))
    assert other.process.wait(60) == 2
    assert other.said().splitlines() == [
        f"sftok: --port {one.port}: Address already in use; name another port, or join the server there with "
        "PREFECT_API_URL"
    ]


def test_a_lost_machine_is_restored_from_its_backup(serving, api, tmp_path) -> None:
    """As the runbook says: the database while it is in use, the store's artifacts before its runs; then all is lost."""
    one = serving()
    with api(one.url):
        first = start_run()
        ends(first, "Completed")
    (file,) = (tmp_path / "home" / "prefect").glob("prefect-*.db")
    saved = tmp_path / "saved"
    saved.mkdir()
    with closing(sqlite3.connect(file)) as database, closing(sqlite3.connect(saved / file.name)) as copy:
        database.backup(copy)
    for folder in ("artifacts", "runs"):
        shutil.copytree(one.store / folder, saved / folder)
    one.kill()
    shutil.rmtree(tmp_path / "home")
    shutil.rmtree(one.store)

    file.parent.mkdir(parents=True)
    shutil.copy(saved / file.name, file)
    for folder in ("artifacts", "runs"):
        shutil.copytree(saved / folder, one.store / folder)
    other = serving()
    with api(other.url):
        assert state_of(first) == "Completed", "Prefect's history is lost"
        ends(start_run(), "Cached")
    place = Store(other.store)
    for manifest in manifests(place).values():
        verify(place, manifest)
