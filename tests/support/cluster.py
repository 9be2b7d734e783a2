"""A team's servers on this machine: PostgreSQL, a Prefect server on it, and Ray's nodes, each a process of its own."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from flows.prefect_server.temporary import health
from tests.support import ROOT
from tests.support.serving_process import command_of, free_port, until

PATIENCE = 90.0  # seconds
PASSWORD = "postgres-secret"  # of a database that lasts as long as the test
RAY_TOKEN = "ray-secret"


def plain_environment(**changes: str) -> dict[str, str]:
    """This process's environment without what points at other servers."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "RAY_", "SFTOK_", "AWS_"))}
    return {**kept, "DO_NOT_TRACK": "1", **changes}


class Process:
    """A server's process, which can be killed and started again on the same port."""

    def __init__(self, command: Sequence[str], folder: Path, environment: Mapping[str, str], user: str | None = None):
        self.command, self.folder, self.environment, self.user = command, folder, environment, user
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; it may not answer yet."""
        folder = self.folder
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                self.command, env=dict(self.environment), cwd=folder, stdout=log, stderr=log, user=self.user
            )

    def family(self) -> list[psutil.Process]:
        """It and all that it started."""
        if self.process is None or self.process.poll() is not None:
            return []
        own = psutil.Process(self.process.pid)
        return [own, *own.children(recursive=True)]

    def kill(self) -> None:
        """Kill -9, with all that it started."""
        family = self.family()
        for one in family:
            one.kill()
        psutil.wait_procs(family, timeout=10)

    def said(self) -> str:
        """The end of what it wrote."""
        return (self.folder / "log").read_text(errors="replace")[-3000:]


class Database:
    """A PostgreSQL server's database."""

    def __init__(self, binaries: Path, port: int) -> None:
        self.binaries, self.port = binaries, port
        self.url = f"postgresql+asyncpg://prefect:{PASSWORD}@127.0.0.1:{port}/postgres"

    def dump(self) -> bytes:
        """All that is in it."""
        command = [str(self.binaries / "pg_dump"), "-h", "127.0.0.1", "-p", str(self.port), "-U", "prefect", "postgres"]
        environment = plain_environment(PGPASSWORD=PASSWORD)
        return subprocess.run(command, check=True, capture_output=True, env=environment).stdout


@contextmanager
def postgres() -> Iterator[Database]:
    """A new database on a free port; skips where PostgreSQL is not installed."""
    found = shutil.which("initdb") or next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))), None)
    if found is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    binaries = Path(found).resolve().parent
    user = "nobody" if os.getuid() == 0 else None  # it refuses to run as root
    folder, port = Path(tempfile.mkdtemp(prefix="sftok-postgres-")), free_port()
    try:
        (folder / "password").write_text(PASSWORD)
        for path in (folder, folder / "password"):
            if user:
                shutil.chown(path, user)
        data = str(folder / "data")
        subprocess.run(
            [
                str(binaries / "initdb"),
                "-D",
                data,
                "-U",
                "prefect",
                "-A",
                "scram-sha-256",
                f"--pwfile={folder}/password",
                "-N",
            ],
            check=True,
            capture_output=True,
            user=user,
            cwd=folder,
        )
        settings = [f"port={port}", "listen_addresses=127.0.0.1", "unix_socket_directories=", "fsync=off"]
        command = [str(binaries / "postgres"), "-D", data, *(f"--{setting}" for setting in settings)]
        server = Process(command, folder, plain_environment(), user)
        server.start()
        try:
            until(lambda: "ready to accept connections" in server.said(), PATIENCE, server.said)
            yield Database(binaries, port)
        finally:
            server.kill()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class PrefectServer(Process):
    """A server as a team runs it, scheduler included."""

    def __init__(self, folder: Path, database: str) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}/api"
        command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
        environment = plain_environment(
            PREFECT_HOME=str(folder),
            PREFECT_SERVER_DATABASE_CONNECTION_URL=database,
            PREFECT_SERVER_ANALYTICS_ENABLED="false",
            PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS="2",
            PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE="prefect.server.concurrency.lease_storage.filesystem",
        )
        super().__init__(command, folder, environment)

    def ready(self) -> "PrefectServer":
        """Return when it answers."""
        until(lambda: health(self.url) is None, PATIENCE, self.said)
        return self


class RayNodes:
    """A head without cores, and nodes of one core each, as `ray start` makes them; with a token."""

    def __init__(self, folder: Path, **environment: str) -> None:
        """`environment` is what workers need, as credentials: each machine has its own."""
        self.folder, self.given = folder, environment
        self.address = f"127.0.0.1:{free_port()}"
        self.environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": RAY_TOKEN,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        }
        # Of its own: Ray leaves the address of a cluster there, and whoever starts one later would join this one.
        self.scratch = tempfile.mkdtemp(prefix="ray-")  # short: sockets are in it
        port = self.address.partition(":")[2]
        self.head = self._node("head", "--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false")
        self.nodes: list[Process] = []

    def add(self) -> Process:
        """One more node."""
        node = self._node(f"node-{len(self.nodes)}", f"--address={self.address}", "--num-cpus=1")
        self.nodes.append(node)
        return node

    def workers(self) -> list[psutil.Process]:
        """Actors at work on any node."""
        found = [one for node in [self.head, *self.nodes] for one in node.family()]
        return [one for one in found if command_of(one).startswith("ray::_Actor")]

    def kill(self) -> None:
        """End all of it."""
        for node in [*self.nodes, self.head]:
            node.kill()
        shutil.rmtree(self.scratch, ignore_errors=True)

    def _node(self, name: str, *arguments: str) -> Process:
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--node-ip-address=127.0.0.1"]
        memory = ["--object-store-memory=134217728", "--disable-usage-stats"]
        own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_TMPDIR": self.scratch}
        environment = plain_environment(**own, **self.environment, **self.given)
        node = Process([*command, *memory, *arguments], self.folder / name, environment)
        node.start()
        until(lambda: "Ray runtime started" in node.said(), PATIENCE, node.said)
        return node


def raylet(node: Process) -> psutil.Process:
    """The process that stands for a machine: without it Ray takes the machine for lost."""
    return next(one for one in node.family() if Path(command_of(one).partition(" ")[0]).name == "raylet")
