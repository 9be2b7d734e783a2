"""Map a function over shards, in this process or by Ray actors on one machine or many."""

import os
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from pydantic import Field, NonNegativeInt, PositiveInt

from infra.compute.cluster import Session, interruptible, one_line, session
from infra.compute.device import release_memory
from infra.config import Config
from infra.errors import TransientError
from infra.progress import Progress, silent

T = TypeVar("T")
R = TypeVar("R")
Work = Callable[[T], R]

RESTARTS = 3  # further attempts at a shard, or at a start, whose worker died
WAIT_SECONDS = 1.0  # between polls of the pool; an interrupt is noticed at once


class WorkerOptions(Config):
    """Number of workers and their resources; only the number of threads can change a result."""

    workers: NonNegativeInt = Field(0, description="worker processes; 0 works in this process, without Ray")
    cpus_per_worker: float = Field(1.0, ge=0, description="cores that Ray reserves per worker")
    gpus_per_worker: float = Field(0.0, ge=0, description="GPUs that Ray reserves per worker; fractions share one")
    threads_per_worker: PositiveInt = Field(1, description="threads of a worker's matrix products, also for workers=0")


def map_shards(
    make_worker: Callable[[], Work[T, R]],
    shards: Sequence[T],
    *,
    options: WorkerOptions,
    progress: Progress = silent,
) -> list[R]:
    """Call a worker on every shard and return the results in the shards' order.

    A worker that dies is replaced and its shard is processed again, so the work on a shard must be idempotent. If a
    machine is lost and the others have no room for more workers, the remaining ones do all of the work.

    Args:
        make_worker: makes the function that does the work, once in each worker: loads models and the like. It is sent
            to other processes, so it should be importable: a module's function, or a partial of one.
        shards: the argument of each call; small and picklable.
        options: number of workers and their resources.
        progress: called after each shard.

    Raises:
        Exception: any error that the work raised, unchanged.
        TransientError: workers were lost for good, or Ray did not start.
    """
    if not shards:
        return []
    if options.workers == 0:
        return _in_process(make_worker, shards, options, progress)
    with session() as connection:
        return _Pool(connection, make_worker, shards, options).run(progress)


class _Actor(Generic[T, R]):
    """One worker process."""

    def __init__(self, make_worker: Callable[[], Work[T, R]], threads: int) -> None:
        self._make, self._threads = make_worker, threads
        self._work: Work[T, R] | None = None

    def start(self) -> None:
        """Make the worker; not in __init__, whose errors Ray would turn into a death of the actor."""
        if self._work is None:
            os.environ["OMP_NUM_THREADS"] = str(self._threads)  # for torch, if the work imports it later
            _set_threads(self._threads)
            self._work = self._make()
            _set_threads(self._threads)

    def work(self, shard: T) -> R:
        """Process one shard; a restarted actor makes its worker first."""
        self.start()
        assert self._work is not None
        return self._work(shard)


class _Pool(Generic[T, R]):
    """Actors that receive one shard at a time, as they become idle."""

    def __init__(
        self, connection: Session, make_worker: Callable[[], Work[T, R]], shards: Sequence[T], options: WorkerOptions
    ) -> None:
        self.shards, self.options = shards, options
        count = min(options.workers, len(shards))
        self.ray = connection.connect(
            cpus=options.cpus_per_worker, gpus=options.gpus_per_worker, processes=options.workers
        )
        # Ray's own restarts would reserve the shard for the new worker, for which there may no longer be room.
        self.actor = self.ray.remote(
            num_cpus=options.cpus_per_worker, num_gpus=options.gpus_per_worker, max_restarts=0, max_task_retries=0
        )(_Actor)
        self.make_worker, self.count = make_worker, count
        self.busy: dict[Any, tuple[Any, int | None]] = {}  # call: actor and shard; None while it starts
        self.idle: list[Any] = []
        self.losses: Counter[int | None] = Counter()  # workers lost by shard; None while they started

    def run(self, progress: Progress) -> list[R]:
        """Process all shards; return the results in the shards' order."""
        try:
            return self._run(progress)
        finally:
            for actor in [*self.idle, *(actor for actor, _ in self.busy.values())]:
                self.ray.kill(actor)

    def _run(self, progress: Progress) -> list[R]:
        results: dict[int, R] = {}
        waiting = deque(range(len(self.shards)))
        for _ in range(self.count):
            self._start()
        started = time.monotonic()
        while len(results) < len(self.shards):
            with interruptible():
                ready, _ = self.ray.wait(list(self.busy), num_returns=1, timeout=WAIT_SECONDS)
            for call in ready:
                actor, index = self.busy[call]
                try:
                    result = self._get(call)
                except self.ray.exceptions.RayError as error:
                    del self.busy[call]
                    self._replace_worker(actor, index, error)
                    waiting.extendleft([] if index is None else [index])
                    continue
                del self.busy[call]
                self.idle.append(actor)
                if index is None:
                    self.losses[None] = 0
                else:
                    results[index] = result
                    _report(progress, len(results), len(self.shards), started)
            while waiting and self.idle:
                actor, index = self.idle.pop(), waiting.popleft()
                self.busy[actor.work.remote(self.shards[index])] = (actor, index)
        return [results[index] for index in range(len(self.shards))]

    def _start(self) -> None:
        """Request a worker; it receives no shard before it has started, since without room it would keep it forever."""
        actor = self.actor.remote(self.make_worker, self.options.threads_per_worker)
        self.busy[actor.start.remote()] = (actor, None)

    def _replace_worker(self, actor: Any, index: int | None, error: Exception) -> None:
        """Replace a worker that was lost with a shard or while it started, unless that happens too often."""
        self.ray.kill(actor)  # if it is only disconnected, it must not continue
        self.losses[index] += 1
        if self.losses[index] > RESTARTS:
            raise TransientError(
                f"lost a worker {RESTARTS + 1} times ({one_line(error)}); "
                "if memory ran out, use fewer workers or smaller batches"
            ) from error
        self._start()

    def _get(self, call: Any) -> Any:
        """Return a call's result, or raise the original error of the work."""
        try:
            with interruptible():
                return self.ray.get(call)
        except self.ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else RuntimeError(one_line(error))
            raise cause from error


def _in_process(
    make_worker: Callable[[], Work[T, R]], shards: Sequence[T], options: WorkerOptions, progress: Progress
) -> list[R]:
    """Process all shards in this process, with as many threads as a worker has, so that results are the same."""
    results: list[R] = []
    started = time.monotonic()
    with _threads(options.threads_per_worker):
        work = make_worker()
        _set_threads(options.threads_per_worker)  # making the worker may have loaded torch
        for shard in shards:
            results.append(work(shard))
            _report(progress, len(results), len(shards), started)
        del work
    release_memory()
    return results


def _report(progress: Progress, done: int, total: int, started: float) -> None:
    progress(done, total, {"shards_per_s": done / max(time.monotonic() - started, 1e-9)})


def _set_threads(threads: int) -> None:
    """Set torch's number of threads if torch is loaded; work that does not use it should not have to load it."""
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(threads)


@contextmanager
def _threads(threads: int) -> Iterator[None]:
    """Set torch's number of threads within the block and restore it afterwards; does nothing if torch is not loaded."""
    torch = sys.modules.get("torch")
    before = torch.get_num_threads() if torch is not None else None
    _set_threads(threads)
    try:
        yield
    finally:
        if before is not None:
            _set_threads(before)
