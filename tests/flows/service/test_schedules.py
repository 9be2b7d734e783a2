"""Cron schedules create runs: with the wrong SQLAlchemy, a healthy server never does, and manual runs hide it."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.prefect_server.temporary import health
from tests.support.prefect_database import MigratedDatabase

PATIENCE = 90  # seconds


@pytest.fixture
def whole_server(tmp_path: Path, database: MigratedDatabase) -> Iterator[str]:
    """A server as a team runs it, scheduler included, on a database of its own."""
    file = database.copy(tmp_path).rename(tmp_path / "prefect.db")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment |= {
        "PREFECT_HOME": str(tmp_path),
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{file}",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "2",
        "DO_NOT_TRACK": "1",
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=tmp_path)
    url = f"http://127.0.0.1:{port}/api"
    try:
        end = time.monotonic() + PATIENCE
        while health(url) is not None:
            assert process.poll() is None, (tmp_path / "log").read_text()[-2000:]
            assert time.monotonic() < end, "the server did not answer"
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def test_a_cron_schedule_creates_runs(whole_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from flows.prefect_server.temporary import prefect_server

    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "client"))
    with prefect_server(tmp_path, api_url=whole_server):
        from prefect.client.orchestration import get_client
        from prefect.client.schemas.actions import DeploymentScheduleCreate
        from prefect.client.schemas.schedules import CronSchedule

        with get_client(sync_client=True) as client:
            flow_id = client.create_flow_from_name("nightly")
            schedule = DeploymentScheduleCreate(schedule=CronSchedule(cron="0 3 * * *"), active=True)
            client.create_deployment(flow_id=flow_id, name="nightly", schedules=[schedule])
            end = time.monotonic() + PATIENCE
            while not (runs := client.read_flow_runs(limit=5)):
                assert time.monotonic() < end, "a healthy server that schedules nothing: look at SQLAlchemy's version"
                time.sleep(0.5)
    assert {run.state_name for run in runs} == {"Scheduled"}
    assert all(run.expected_start_time.hour == 3 for run in runs)
