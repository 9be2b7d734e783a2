"""Connect to Ray: start a local cluster or join one. Only this module and `launch` import Ray."""

import logging
import math
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from infra.environment import named
from infra.errors import TransientError

log = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 128 * 2**20  # shards are named, not sent: only names and small results pass through

CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 60.0  # of the machines of a cluster that are asked for their GPUs
RAY_VARIABLES = ("SFTOK_RAY_ADDRESS", "RAY_ADDRESS")
RAY_REMEDY = "start it, correct SFTOK_RAY_ADDRESS or RAY_ADDRESS (with RAY_AUTH_MODE=token if it asks so), or unset it"
SOCKET = "ray/session_2026-01-31_12-00-00_000000_1234567/sockets/plasma_store"
SOCKET_BYTES = 103 if sys.platform == "darwin" else 107  # of a socket's path, at most

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # would upload the working directory
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths mean the same in ranks
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # between polls of the ranks, whose end is noticed so late
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",  # then it is looked anew how many ranks there is room for
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process that nobody asks
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
}


class Session:
    """A connection to Ray, made on first use and ended by `close`."""

    def __init__(self, address: str | None, num_cpus: int | None) -> None:
        self.address, self.num_cpus = address, num_cpus
        self._is_ours = False
        # Linux ends Ray's processes when the thread that started them ends, so that thread has to outlive them.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ray")

    def connect(self, *, cpus: float, gpus: float, processes: int) -> Any:
        """Connect for `processes` of so many cores and GPUs each, and return the `ray` module.

        Raises:
            ValueError: the cluster cannot be reached, or is too small for one worker.
            TransientError: a local cluster did not start.
        """
        ray = self._thread.submit(self._connect, math.ceil(processes * cpus)).result()
        _restore_sigterm_handler()
        self._check_room(ray, cpus, gpus)
        return ray

    def check_room(self, *, cpus: float, gpus: float, processes: int) -> None:
        """Refuse processes that this machine has no room for all at once; a joined cluster may grow.

        Raises:
            ValueError: names what there is.
        """
        import ray

        there = ray.cluster_resources()
        for what, each, name in (("GPU", gpus, "a GPU"), ("CPU", cpus, "a core")):
            if there.get(what, 0) < each * processes and not self.address:
                has = f"{there.get(what, 0):g}"
                raise ValueError(f"{processes} processes need {name} each, and this machine has {has}: lower --ranks")

    def close(self) -> None:
        """Stop a cluster started here, or leave one that was joined; waits for an interrupted start to finish."""
        self._thread.submit(self._disconnect).result()
        self._thread.shutdown()

    def _connect(self, cores: int) -> Any:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        check_reachable(self.address)
        import ray

        if ray.is_initialized():
            return ray
        self._is_ours = True
        log_errors_of_ray_threads()
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        ray._private.worker.print_worker_logs = _log_worker_lines  # Ray would print deaths of workers on our stdout
        if self.address:
            try:
                ray.init(address=self.address, **quiet)
            except (OSError, RuntimeError, ValueError) as error:
                place = _named(self.address)
                raise ValueError(f"{place} cannot be joined ({one_line(error)}); {RAY_REMEDY}") from error
            return ray
        cpus = self.num_cpus or max(os.cpu_count() or 1, cores)
        local: dict[str, Any] = {
            "num_cpus": cpus,
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
            "_temp_dir": _short_folder(),
        }
        try:
            with _python_path():
                ray.init(address="local", **local, **quiet)
        except (OSError, RuntimeError) as error:
            raise TransientError(f"Ray did not start here ({one_line(error)}); 0 workers work without it") from error
        return ray

    def _disconnect(self) -> None:
        if self._is_ours:
            import ray

            ray.shutdown()
        self._is_ours = False

    def _check_room(self, ray: Any, cpus: float, gpus: float) -> None:
        """Reject processes that no machine has room for; on a joined cluster, which may grow, only warn."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
            return
        problem = f"no machine of the Ray cluster has {cpus:g} CPUs and {gpus:g} GPUs for one process"
        if not self.address:
            raise ValueError(f"{problem}; lower cpus_per_worker or gpus_per_worker")
        log.warning("%s; waiting for one to join", problem)


_current: Session | None = None
_lock = threading.Lock()


@contextmanager
def interruptible() -> Iterator[None]:
    """Re-raise an interrupt that arrives while Ray waits as itself.

    Ray waits in compiled code, which wraps an exception from a signal handler in a SystemError.
    """
    try:
        yield
    except SystemError as error:
        raise (error.__cause__ or error) from None


def cluster_gpus(address: str) -> float:
    """Count the GPUs that the machines of a running Ray cluster have, or those that its autoscaler may start.

    Raises:
        ValueError: the cluster cannot be reached.
    """
    with session(address) as connection:
        ray = connection.connect(cpus=0, gpus=0, processes=1)
        now = sum(node["Resources"].get("GPU", 0) for node in ray.nodes() if node["Alive"])
        most = ray._private.state.state.get_max_resources_from_cluster_config() or {}
        return float(max(now, most.get("GPU", 0)))


def cluster_gpu_memory(address: str) -> int | None:
    """Return the bytes of the smallest GPU that the machines of a running Ray cluster have now; None if unknown."""
    from infra.compute.device import gpu_memory

    try:
        with session(address) as connection, interruptible():
            ray = connection.connect(cpus=0, gpus=0, processes=1)
            from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

            nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU", 0)]
            # Without a GPU of its own, a task sees all that its machine has, and waits for none.
            tasks = [
                ray.remote(num_cpus=0)(gpu_memory)
                .options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
                .remote()
                for node in nodes
            ]
            try:
                sizes = ray.get(tasks, timeout=ANSWER_SECONDS)
            except ray.exceptions.RayError:  # late answers, too
                for task in tasks:
                    ray.cancel(task)
                return None
    except ValueError:
        return None
    return min((size for size in sizes if size is not None), default=None)


@contextmanager
def session(address: str | None = None, num_cpus: int | None = None) -> Iterator[Session]:
    """Share one Ray connection between all `map_shards` calls inside; a nested session reuses the outer one.

    Args:
        address: a cluster to join, as host:port or "auto"; None starts one on this machine on first use.
        num_cpus: cores of a cluster started here; None for the machine's, or more if more workers are requested.
    """
    global _current
    with _lock:
        outer, own = _current, Session(address, num_cpus)
        _current = outer or own
    try:
        yield outer or own
    finally:
        if outer is None:
            with _lock:
                _current = None
        own.close()


@contextmanager
def _python_path() -> Iterator[None]:
    """Let processes started inside import what this process can import."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(
        os.path.abspath(entry) for entry in sys.path if not entry.endswith(".zip")
    )
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _restore_sigterm_handler() -> None:
    """Restore this process's SIGTERM handler: Ray's own aborts the process after 3 s, whatever it is saving."""
    handler = signal.getsignal(signal.SIGTERM)
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def check_reachable(address: str | None) -> None:
    """Reject an address at which no cluster listens, or that is none; Ray would retry for minutes.

    Raises:
        ValueError: one line that names the variable, its value and the remedy.
    """
    if address in (None, "auto", "local"):
        return
    scheme, _, place = address.rpartition("://")
    host, _, port = place.rpartition(":")
    if scheme in ("http", "https"):
        raise ValueError(
            f"{_named(address)} is a dashboard's address; give the head's, as HOST:6379 or ray://HOST:10001"
        )
    if not host or not port.isdigit():
        raise ValueError(f"{_named(address)} is no address; write host:port, ray://host:port or auto")
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{_named(address)} cannot be reached ({reason}); {RAY_REMEDY}") from error


def _named(address: str) -> str:
    """Name the variable that an address was read from, if one was, without credentials."""
    names = [name for name in RAY_VARIABLES if os.environ.get(name) == address]
    return named(names[0]) if names else f"the Ray cluster at {address}"


def _short_folder() -> str | None:
    """Return a folder for a local cluster's files if TMPDIR, Ray's own choice, is too long for the paths of sockets.

    Raises:
        ValueError: nor can the usual one, /tmp, be written to.
    """
    name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    folder = os.environ.get(name, "")
    if len(os.fsencode(os.path.join(folder, SOCKET))) <= SOCKET_BYTES:
        return None
    if not os.access("/tmp", os.W_OK | os.X_OK):
        raise ValueError(f"{name} = {folder} is too long for Ray's sockets; set it to a shorter folder, or --workers 0")
    return "/tmp/ray"


def _log_worker_lines(data: dict[str, Any], *_: Any, **__: Any) -> None:
    """Log what Ray would print: a worker's death as a warning of one line, the rest at debug level."""
    for line in data.get("lines", ()):
        if line.startswith("A worker died"):
            log.warning("a worker process died; its work is done again")
        log.debug("ray: %s", line)


def log_errors_of_ray_threads() -> None:
    """Log what Ray's own threads raise, as they do where a cluster is stopped while it starts; print no traceback."""
    before = threading.excepthook
    if getattr(before, "knows_ray", False):
        return

    def hook(raised: threading.ExceptHookArgs) -> None:
        if raised.thread is not None and raised.thread.name.startswith("ray_"):
            log.debug("%s: %s", raised.thread.name, raised.exc_value)
            return
        before(raised)

    hook.knows_ray = True  # type: ignore[attr-defined]
    threading.excepthook = hook


def one_line(error: BaseException) -> str:
    """Return the last non-empty line of an error: Ray's messages begin with a traceback and advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
