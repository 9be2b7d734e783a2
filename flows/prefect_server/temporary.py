"""A temporary Prefect server that lives exactly as long as the run that started it.

This is the run's side; `flows.prefect_server.process` is the server's own.
"""

import contextlib
import http.client
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from flows.prefect_server import process as process_file
from flows.prefect_server.database import set_damaged_aside
from flows.prefect_server.environment import readable_proxies
from flows.prefect_server.process import database_of

START_SECONDS = 180.0  # a first start migrates a database: about 12 s on two idle cores
STOP_SECONDS = 5.0
LOG_BYTES = 5_000_000
LOOPBACK = "127.0.0.1"

QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
    "PREFECT_LOGGING_TO_API_ENABLED": "false",  # the server's own lines belong in its log file
    "PREFECT_SERVER_MEMOIZE_BLOCK_AUTO_REGISTRATION": "false",  # the memo outlives a deleted database
    "PYTHONUNBUFFERED": "1",
    "PYTHONWARNINGS": "ignore",
}
# A run without deployments has nothing to schedule, trigger or notify.
NO_SERVICES = {
    "PREFECT_SERVER_SERVICES_SCHEDULER_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_LATE_RUNS_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_FOREMAN_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_TRIGGERS_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_PAUSE_EXPIRATIONS_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_CANCELLATION_CLEANUP_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_REPOSSESSOR_ENABLED": "false",
}


class ServerError(RuntimeError):
    """The Prefect server did not start or does not answer."""


class Server:
    """A Prefect API: of a server of our own until `stop`, or of somebody else's."""

    def __init__(self, url: str, process: subprocess.Popen[bytes] | None = None, log: Path | None = None) -> None:
        self.url = url
        self.log = log
        self._process = process

    @property
    def pid(self) -> int | None:
        """Return the process id of a server of our own."""
        return self._process.pid if self._process else None

    def wait(self, timeout: float = START_SECONDS) -> None:
        """Wait until the API answers.

        Raises:
            ServerError: it does not, with the log's last line if the server has ended.
        """
        end = time.monotonic() + timeout
        while (trouble := health(self.url)) is not None:
            if self._process is None:
                raise ServerError(f"the Prefect API at {self.url} does not answer: {trouble}")
            if (code := self._process.poll()) is not None:
                raise ServerError(f"the temporary Prefect server ended with code {code}: {self._last_line()}")
            if time.monotonic() > end:
                raise ServerError(f"the temporary Prefect server did not answer within {timeout:.0f} s; see {self.log}")
            time.sleep(0.1)

    def stop(self) -> None:
        """Stop a server of our own: terminate it, and kill it if it does not end in time."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _last_line(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines() if self.log else []
        return f"{lines[-1].strip() if lines else 'it logged nothing'} (log: {self.log})"


@contextlib.contextmanager
def prefect_server(home: Path, *, api_url: str | None = None, verbose: bool = False) -> Iterator[Server]:
    """Point Prefect at `api_url`, or at a temporary server under `home` that is stopped when the block ends.

    The environment is set on entry, so Prefect must be imported inside the block. The server may still be starting:
    call `wait` before the first flow, and import heavy modules meanwhile.
    """
    server = Server(api_url) if api_url else start_server(home)
    before = dict(os.environ)
    try:
        configure(server.url, home=None if api_url else home, verbose=verbose)
        yield server
    finally:
        _flush_logs_and_events()
        server.stop()
        os.environ.clear()
        os.environ.update(before)


def configure(url: str, *, home: Path | None, verbose: bool = False) -> None:
    """Set the environment variables that Prefect reads on import.

    Its log lines go to stderr only if `verbose`; the API always gets them, ours included.
    """
    os.environ.update(
        DO_NOT_TRACK="1",  # Prefect's client has telemetry, and announces it on terminals
        PREFECT_API_URL=url,
        PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL="INFO" if verbose else "CRITICAL",
        PREFECT_LOGGING_EXTRA_LOGGERS="flows,sftok,generator,infra",
        PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW="ignore",
        PREFECT_CLI_PROMPT="false",
    )
    if home is not None:
        os.environ.update(readable_proxies(), PREFECT_HOME=str(_prefect_home(home)))
        for name in ("NO_PROXY", "no_proxy"):  # a proxy cannot reach our loopback
            os.environ[name] = ",".join(filter(None, [os.environ.get(name), LOOPBACK]))
    if "prefect" in sys.modules:  # imported before, by a library user or a test: its settings are stale
        from prefect.context import refresh_global_settings_context

        refresh_global_settings_context()


def health(url: str, timeout: float = 5.0) -> str | None:
    """Check a Prefect API: None if it answers at `url`, else the problem in words."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return "not an http(s) URL"
    connect = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    try:
        connection = connect(parts.hostname, parts.port, timeout=timeout)
        try:
            connection.request("GET", f"{parts.path.rstrip('/')}/health")
            status = connection.getresponse().status
        finally:
            connection.close()
    except (OSError, http.client.HTTPException, ValueError) as error:
        return str(error) or type(error).__name__
    # 401 and 403 are answers: the client sends the key, this check does not.
    return None if status in (200, 401, 403) else f"status {status}"


def _flush_logs_and_events() -> None:
    """Send the logs and events that Prefect still buffers, while the server is up."""
    if "prefect.main" in sys.modules:
        from prefect.events.worker import EventsWorker
        from prefect.logging.handlers import APILogWorker

        APILogWorker.drain_all(timeout=STOP_SECONDS)
        EventsWorker.drain_all(timeout=STOP_SECONDS)


def _prefect_home(home: Path) -> Path:
    return home.expanduser().resolve() / "prefect"


def start_server(home: Path) -> Server:
    """Start a server of our own under `home`, without waiting until it answers; the caller stops it."""
    # Bound here and inherited, so that no other process can take the port in between.
    with socket.create_server((LOOPBACK, 0)) as listener:
        return start_process(home, listener, NO_SERVICES, log="server.log")


def start_process(home: Path, listener: socket.socket, options: Mapping[str, str], *, log: str) -> Server:
    """Start the process of a server that listens at a socket, with Prefect's settings in `options` and no others."""
    folder, port = _prefect_home(home), listener.getsockname()[1]
    # Uvicorn takes an inherited socket for a Unix one and leaves Nagle's algorithm on, which costs 40 ms an answer.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    folder.mkdir(parents=True, exist_ok=True)
    set_damaged_aside(database_of(folder))
    file, url = folder / log, f"http://{LOOPBACK}:{port}/api"
    if file.exists() and file.stat().st_size > LOG_BYTES:
        file.replace(folder / f"{log}.1")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment = {
        **inherited,
        **readable_proxies(),
        **QUIET,
        **options,
        "PREFECT_HOME": str(folder),
        "PREFECT_API_URL": url,
        "PREFECT_SERVER_API_HOST": LOOPBACK,
        "PREFECT_SERVER_API_PORT": str(port),
    }
    with file.open("ab") as lines:
        process = subprocess.Popen(
            [sys.executable, "-P", process_file.__file__, str(listener.fileno()), str(os.getpid())],
            cwd=folder,  # where its database is, and no prefect.toml or .env that is not meant for it
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=lines,
            stderr=subprocess.STDOUT,
            pass_fds=[listener.fileno()],
            start_new_session=True,  # the run handles Ctrl-C, and stops the server after a last flush
        )
    return Server(url, process, file)
