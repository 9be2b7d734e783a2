"""Temporary servers: two at once on a new home, quiet, usable, and gone when the run is."""

import re
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing

import httpx
import psutil
import pytest

from flows.prefect_server.database import set_damaged_aside
from flows.prefect_server.temporary import ServerError, health, prefect_server, start_server


def test_two_servers_started_at_once_on_a_new_home_both_answer(database, tmp_path):
    """Guards against the race of two migrations of one SQLite file, and against the leftovers of a killed one.

    They were started for the database that all tests copy, which is not there if one of them does not answer.
    """
    assert len(set(database.pids)) == 2
    assert [file.name for file in database.folder.glob("prefect-*.db")] == [database.name], "the database is elsewhere"
    assert not list(database.folder.glob("*.new*")), "half a database was left"
    assert database.copy(tmp_path).exists()


def test_every_kind_of_object_can_be_read(prefect_api):
    """Guards against combinations of packages in which health is 200 and every read answers 422."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        for kind in ("flows", "flow_runs", "task_runs", "artifacts", "deployments", "block_documents", "work_pools"):
            assert getattr(client, f"read_{kind}")(limit=5) is not None, kind
        assert client.read_concurrency_limits(limit=5, offset=0) == []


def test_an_answer_waits_for_no_acknowledgement(running_server):
    """Guards against 40 ms for each call, which Nagle's algorithm takes where a delayed acknowledgement meets it."""
    with httpx.Client() as client:
        seconds = [client.get(f"{running_server.url}/health").elapsed.total_seconds() for _ in range(30)]
    assert min(seconds[1:]) < 0.03


def test_nothing_is_reported_to_prefects_makers(prefect_api):
    from prefect._internal.analytics.enabled import is_telemetry_enabled
    from prefect.client.orchestration import get_client

    assert not is_telemetry_enabled()
    with get_client(sync_client=True) as client:
        assert client.request("GET", "/admin/settings").json()["server"]["analytics_enabled"] is False


def test_server_says_nothing_while_all_is_well(running_server, home):
    """But for what two servers on one SQLite file may do to each other: an event waits for the lock and is retried."""
    second = start_server(home)
    second.wait()
    second.stop()
    log = (home / "prefect" / "server.log").read_text()
    told = [text for text in re.split(r"^(?=\d\d:\d\d:\d\d\.\d+ \| )", log, flags=re.MULTILINE) if text]
    assert [text for text in told if "to retry, 0 dropped" not in text or "database is locked" not in text] == []


def test_stopped_server_leaves_no_process(running_server, home):
    server = start_server(home)
    process = psutil.Process(server.pid)
    family = [process, *process.children(recursive=True)]
    server.stop()
    assert not [member for member in family if member.is_running()]


def test_killed_run_takes_its_server_along(running_server, home):
    """kill -9 of the run: nobody is left to stop the server, so the system does."""
    script = "import sys, time; from pathlib import Path; from flows.prefect_server.temporary import start_server\n"
    script += "print(start_server(Path(sys.argv[1])).pid, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", script, str(home)], stdout=subprocess.PIPE, text=True) as run:
        server = psutil.Process(int(run.stdout.readline()))
        time.sleep(1)  # the server asks for its death signal first of all, but it has to be alive to ask
        assert server.is_running()
        run.send_signal(signal.SIGKILL)
    gone, alive = psutil.wait_procs([server], timeout=5)
    assert server in gone, alive


def test_server_that_cannot_start_says_where_to_look(tmp_path):
    home = tmp_path / "home"
    (home / "prefect" / "database.lock").mkdir(parents=True)
    server = start_server(home)
    with pytest.raises(ServerError, match=r"ended with code 1: IsADirectoryError.*server\.log"):
        server.wait()


@pytest.mark.parametrize("left", [0, 50, 4096, 100_000, None])
def test_damaged_database_is_set_aside_and_a_sound_one_is_kept(running_server, home, tmp_path, caplog, left):
    (sound,) = (home / "prefect").glob("prefect-*.db")
    copy = tmp_path / "a ?#%41" / sound.name
    copy.parent.mkdir()
    with closing(sqlite3.connect(sound)) as connection, closing(sqlite3.connect(copy)) as target:
        connection.backup(target)
    copy.write_bytes(copy.read_bytes()[:left])
    copy.with_name(f"{copy.name}.damaged-1").touch()
    set_damaged_aside(copy)
    assert copy.exists() == (left is None)
    aside = copy.with_name(f"{copy.name}.damaged-2")
    assert [f"is kept as {aside.name}, and" in line for line in caplog.messages] == ([] if left is None else [True])
    assert aside.exists() == (left is not None)


def test_text_in_place_of_a_database_is_set_aside(tmp_path):
    database = tmp_path / "prefect.db"
    database.write_text("no database " * 1000)
    set_damaged_aside(database)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["database.lock", "prefect.db.damaged-1"]


def test_settings_are_given_back(running_server, monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", "http://before")
    import os

    with prefect_server(running_server.log.parent, api_url=running_server.url):
        assert os.environ["PREFECT_API_URL"] == running_server.url
    assert os.environ["PREFECT_API_URL"] == "http://before"


@pytest.mark.parametrize(
    ("url", "trouble"),
    [
        ("http://127.0.0.1:9/api", "refused"),
        ("ftp://127.0.0.1/api", "not an http"),
        ("http://127.0.0.1:port/api", "Port could not be cast"),
    ],
)
def test_health_names_the_trouble(url, trouble):
    assert trouble in health(url)
