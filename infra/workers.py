"""Map a function over shards: in this process, or by Ray actors on one machine or many. The only importer of Ray."""

import logging
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from pydantic import Field, NonNegativeInt, PositiveInt

from infra.config import Config
from infra.errors import TransientError
from infra.progress import Progress, silent

log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")
Work = Callable[[T], R]

RESTARTS = 3  # of a worker that died, and attempts more of the shard it had
OBJECT_STORE_BYTES = 128 * 2**20  # shards are named, not sent: only names and small results pass through
WAIT_SECONDS = 1.0  # between looks at the pool; an interrupt is noticed at once

KNOCK_SECONDS = 5.0
RAY_REMEDY = "start it, correct SFTOK_RAY_ADDRESS (with RAY_AUTH_MODE=token if it asks for one), or unset it"

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # it would upload the working directory
}


class WorkerOptions(Config):
    """How wide the work runs; of these, only the threads can change a result."""

    workers: NonNegativeInt = Field(0, description="worker processes; 0 works in this process, without Ray")
    cpus_per_worker: float = Field(1.0, ge=0, description="cores that Ray reserves for a worker")
    gpus_per_worker: float = Field(0.0, ge=0, description="GPUs that Ray reserves for a worker; fractions share one")
    threads_per_worker: PositiveInt = Field(1, description="threads of a worker's matrix products, also for workers=0")


def map_shards(
    make_worker: Callable[[], Work[T, R]],
    shards: Sequence[T],
    *,
    options: WorkerOptions,
    progress: Progress = silent,
) -> list[R]:
    """Call a worker on every shard and return the results in the shards' order.

    A worker that dies is restarted and its shard is done again, so the work on a shard must be repeatable.

    Args:
        make_worker: makes the function that does the work, once in each worker: loads models and the like. It is sent
            to other processes, so it should be importable: a function of a module, or a partial of one.
        shards: what each call gets; small and picklable.
        options: how wide to run.
        progress: called after each shard.

    Raises:
        Exception: what the work raised, as itself.
        TransientError: workers were lost for good, or Ray did not start.
    """
    if not shards:
        return []
    if options.workers == 0:
        return _in_process(make_worker, shards, options, progress)
    if _current is not None:
        return _Pool(_current, make_worker, shards, options).run(progress)
    with session() as own:
        return _Pool(own, make_worker, shards, options).run(progress)


class Session:
    """A connection to Ray that is made at the first use and ended by `close`."""

    def __init__(self, address: str | None, num_cpus: int | None) -> None:
        self.address, self.num_cpus = address, num_cpus
        self._is_ours = False
        # Linux ends Ray's processes with the thread that started them, so that thread has to last as long as they.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ray")

    def connect(self, options: WorkerOptions) -> Any:
        """The `ray` module, connected.

        Raises:
            ValueError: the cluster cannot be reached, or is too small for one worker.
            TransientError: a local cluster did not start.
        """
        ray = self._thread.submit(self._connect, options).result()
        self._check_room(ray, options)
        return ray

    def close(self) -> None:
        """Stop a cluster that was started here, leave one that was joined; waits for a start that was interrupted."""
        self._thread.submit(self._disconnect).result()
        self._thread.shutdown()

    def _connect(self, options: WorkerOptions) -> Any:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        if self.address:
            _knock(self.address)
        import ray

        if ray.is_initialized():
            return ray
        self._is_ours = True
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        ray._private.worker.print_worker_logs = _say  # Ray would print deaths of workers on our stdout
        if self.address:
            try:
                ray.init(address=self.address, **quiet)
            except (OSError, RuntimeError, ValueError) as error:
                raise ValueError(
                    f"the Ray cluster at {self.address} cannot be joined ({_line(error)}); {RAY_REMEDY}"
                ) from error
            return ray
        cpus = self.num_cpus or max(os.cpu_count() or 1, math.ceil(options.workers * options.cpus_per_worker))
        local: dict[str, Any] = {
            "num_cpus": cpus,
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
        }
        try:
            with _python_path():
                ray.init(address="local", **local, **quiet)
        except (OSError, RuntimeError) as error:
            raise TransientError(f"Ray did not start here ({_line(error)}); 0 workers work without it") from error
        return ray

    def _disconnect(self) -> None:
        if self._is_ours:
            import ray

            ray.shutdown()
        self._is_ours = False

    def _check_room(self, ray: Any, options: WorkerOptions) -> None:
        """Refuse what would wait for ever; a joined cluster may grow, so there it is only said."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cpus, gpus = options.cpus_per_worker, options.gpus_per_worker
        if any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
            return
        trouble = f"no machine of the Ray cluster has {cpus:g} CPUs and {gpus:g} GPUs for one worker"
        if not self.address:
            raise ValueError(f"{trouble}; lower cpus_per_worker or gpus_per_worker")
        log.warning("%s; waiting for one to join", trouble)


_current: Session | None = None
_lock = threading.Lock()


@contextmanager
def session(address: str | None = None, num_cpus: int | None = None) -> Iterator[Session]:
    """Share one Ray connection between all `map_shards` inside; within another session it is that one.

    Args:
        address: a cluster to join, as host:port or "auto"; None starts one on this machine at the first use.
        num_cpus: cores of a cluster started here; None for the machine's, or more if more workers are asked for.
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


class _Actor(Generic[T, R]):
    """One worker process."""

    def __init__(self, make_worker: Callable[[], Work[T, R]], threads: int) -> None:
        self._make, self._threads = make_worker, threads
        self._work: Work[T, R] | None = None

    def start(self) -> None:
        """Make the worker: not in __init__, whose errors Ray turns into a death of the actor."""
        if self._work is None:
            os.environ["OMP_NUM_THREADS"] = str(self._threads)  # for torch, if the work imports it later
            _set_threads(self._threads)
            self._work = self._make()
            _set_threads(self._threads)

    def work(self, shard: T) -> R:
        """Do one shard; a restarted actor starts over first."""
        self.start()
        assert self._work is not None
        return self._work(shard)


class _Pool(Generic[T, R]):
    """Actors that are given one shard each at a time, as they become free."""

    def __init__(
        self, connection: Session, make_worker: Callable[[], Work[T, R]], shards: Sequence[T], options: WorkerOptions
    ) -> None:
        self.shards, self.options = shards, options
        self.ray = connection.connect(options)
        remote = self.ray.remote(
            num_cpus=options.cpus_per_worker,
            num_gpus=options.gpus_per_worker,
            max_restarts=RESTARTS,
            max_task_retries=RESTARTS,
        )(_Actor)
        count = min(options.workers, len(shards))
        self.actors = [remote.remote(make_worker, options.threads_per_worker) for _ in range(count)]

    def run(self, progress: Progress) -> list[R]:
        """All results, in the shards' order."""
        try:
            return self._run(progress)
        finally:
            for actor in self.actors:
                self.ray.kill(actor)

    def _run(self, progress: Progress) -> list[R]:
        results: dict[int, R] = {}
        following = iter(range(len(self.shards)))
        # An actor gets no shard before it has started: one that the cluster has no room for would keep it for ever.
        busy: dict[Any, tuple[Any, int | None]] = {actor.start.remote(): (actor, None) for actor in self.actors}
        started = time.monotonic()
        while len(results) < len(self.shards):
            ready, _ = self.ray.wait(list(busy), num_returns=1, timeout=WAIT_SECONDS)
            for call in ready:
                actor, index = busy.pop(call)
                result = self._get(call)
                if index is not None:
                    results[index] = result
                    _report(progress, len(results), len(self.shards), started)
                index = next(following, None)
                if index is not None:
                    busy[actor.work.remote(self.shards[index])] = (actor, index)
        return [results[index] for index in range(len(self.shards))]

    def _get(self, call: Any) -> Any:
        """A call's result; its error as itself; a lost worker as a TransientError."""
        errors = self.ray.exceptions
        try:
            return self.ray.get(call)
        except errors.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else RuntimeError(_line(error))
            raise cause from error
        except errors.RayError as error:
            raise TransientError(
                f"lost a worker {RESTARTS + 1} times ({_line(error)}); "
                "if memory ran out, use fewer workers or smaller batches"
            ) from error


def _in_process(
    make_worker: Callable[[], Work[T, R]], shards: Sequence[T], options: WorkerOptions, progress: Progress
) -> list[R]:
    """The same with as many threads, so that the results are the same too."""
    results: list[R] = []
    started = time.monotonic()
    with _threads(options.threads_per_worker):
        work = make_worker()
        for shard in shards:
            results.append(work(shard))
            _report(progress, len(results), len(shards), started)
    return results


def _report(progress: Progress, done: int, total: int, started: float) -> None:
    progress(done, total, {"shards_per_s": done / max(time.monotonic() - started, 1e-9)})


def _set_threads(threads: int) -> None:
    """Set torch's threads if it is loaded; work that does not use it should not wait for it."""
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(threads)


@contextmanager
def _threads(threads: int) -> Iterator[None]:
    """Torch with so many threads, and with as many as before afterwards."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _python_path() -> Iterator[None]:
    """Let processes started inside import what this one can import."""
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


def _knock(address: str) -> None:
    """Refuse an address at which nobody listens; Ray would try for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdigit():
        return  # "auto" and the like
    try:
        socket.create_connection((host, int(port)), KNOCK_SECONDS).close()
    except OSError as error:
        raise ValueError(
            f"the Ray cluster at {address} cannot be reached ({error.strerror or error}); {RAY_REMEDY}"
        ) from error


def _say(data: dict[str, Any], *_: Any, **__: Any) -> None:
    """Log what Ray would print: a death in one line, the rest for those who debug."""
    for line in data.get("lines", ()):
        if line.startswith("A worker died"):
            log.warning("a worker process died and is started again; its shard is done again")
        log.debug("ray: %s", line)


def _line(error: BaseException) -> str:
    """The last line that says something: Ray's messages begin with a traceback and advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
