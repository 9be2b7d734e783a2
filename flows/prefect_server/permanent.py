"""The Prefect server of `sftok serve`: that of `flows.prefect_server.temporary`, with all services.

It has a scheduler and triggers, and its leases survive a restart. It shares the database of the temporary servers under
SFTOK_HOME, listens on loopback only, and ends with the process that started it.
"""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from flows.prefect_server.temporary import LOOPBACK, Server, configure, prefect_server, start_process

SERVICES = {
    "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "20",  # a new schedule takes effect within this time
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
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
    try:
        listener = socket.create_server((LOOPBACK, port))
    except OSError as error:
        raise ValueError(
            f"--port {port}: {os.strerror(error.errno or 0)}; name another port, or join the server there with "
            "PREFECT_API_URL"
        ) from None
    given = {name: value for name, value in os.environ.items() if name.startswith("PREFECT_SERVER_")}
    with listener:
        return start_process(home, listener, {**SERVICES, **given}, log="serve.log")
