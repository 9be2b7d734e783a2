"""The Prefect server of `sftok serve`: that of `flows.prefect_server.temporary`, with all services.

It has a scheduler and triggers, and its leases survive a restart. It shares the database of the temporary servers under
SFTOK_HOME, listens on loopback only, and ends with the process that started it.
"""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from flows.prefect_server import temporary as server_file
from flows.prefect_server.temporary import LOOPBACK, Server, configure, prefect_server

SERVICES = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
    "PREFECT_LOGGING_TO_API_ENABLED": "false",
    "PREFECT_SERVER_MEMOIZE_BLOCK_AUTO_REGISTRATION": "false",
    "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "20",  # a new schedule takes effect within this time
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    "PYTHONUNBUFFERED": "1",
    "PYTHONWARNINGS": "ignore",
}


@contextlib.contextmanager
def permanent_server(home: Path, *, port: int, api_url: str | None, verbose: bool = False) -> Iterator[Server]:
    """Point Prefect at `api_url`, or at a server of our own with all services that is stopped when the block ends."""
    from flows.prefect_server.heartbeat import BEAT_SECONDS

    server = Server(api_url) if api_url else start_permanent_server(home, port)
    try:
        with prefect_server(home, api_url=server.url, verbose=verbose):  # restores the environment
            os.environ["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] = str(BEAT_SECONDS)
            configure(server.url, home=None if api_url else home, verbose=verbose)
            yield server
    finally:
        server.stop()


def start_permanent_server(home: Path, port: int) -> Server:
    """Start a server with all services, without waiting until it answers; the caller stops it.

    Raises:
        ValueError: the port is taken.
    """
    folder = home.expanduser().resolve() / "prefect"
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "serve.log"
    try:
        listener = socket.create_server((LOOPBACK, port))
    except OSError as error:
        raise ValueError(
            f"--port {port}: {os.strerror(error.errno or 0)}; name another port, or join the server there with "
            "PREFECT_API_URL"
        ) from None
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    given = {name: value for name, value in os.environ.items() if name.startswith("PREFECT_SERVER_")}
    environment = {
        **inherited,
        **SERVICES,
        **given,
        "PREFECT_HOME": str(folder),
        "PREFECT_API_URL": f"http://{LOOPBACK}:{port}/api",
        "PREFECT_SERVER_API_HOST": LOOPBACK,
        "PREFECT_SERVER_API_PORT": str(port),
    }
    with listener, log.open("ab") as lines:
        process = subprocess.Popen(
            [sys.executable, "-P", server_file.__file__, str(listener.fileno()), str(os.getpid())],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=lines,
            stderr=subprocess.STDOUT,
            pass_fds=[listener.fileno()],
            start_new_session=True,
        )
    return Server(f"http://{LOOPBACK}:{port}/api", process, log)
