"""Data-parallel training: the same work in several processes that share each step's micro-batches.

Ranks are actors on Ray, one per GPU or group of cores. If one is lost, all are started again, and the work goes on from
its own last checkpoint. One rank on CPUs works in this process; on a GPU it has a process of its own, which leaves the
card's memory when it is done.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from infra.compute.cluster import Session, interruptible, node_address, one_line, session
from infra.errors import TransientError
from infra.progress import Progress, silent

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

R = TypeVar("R")
Report = tuple[int, int, Mapping[str, float]]

RESTARTS = 3  # of all ranks, after one of them was lost
WAIT_SECONDS = 0.5  # between looks at the ranks and their progress
GRACE_SECONDS = 10.0  # for the other ranks to say why, when one has failed
BUCKET = 1 << 24  # elements that are reduced at once


class Ranks(NamedTuple):
    """Which of how many processes this one is."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes what all have made."""
        return self.rank == 0

    def share(self, parts: int) -> range:
        """Which of a step's `parts` equal parts are this rank's.

        Raises:
            ValueError: they cannot be shared equally.
        """
        if parts % self.size:
            raise ValueError(
                f"{parts} micro-batches a step do not divide by {self.size} ranks; "
                "set training.micro_batch so that batch_size / micro_batch does"
            )
        return range(self.rank * parts // self.size, (self.rank + 1) * parts // self.size)

    def total(self, tensor: "Tensor") -> "Tensor":
        """The sum of every rank's `tensor`; alone, the tensor itself."""
        if self.size == 1:
            return tensor
        import torch.distributed as dist

        summed = tensor.clone()
        dist.all_reduce(summed)
        return summed

    def totals_(self, tensors: list["Tensor"]) -> None:
        """Replace each tensor by its sum over all ranks, a bucket at a time, in an order that every rank shares."""
        if self.size == 1:
            return
        import torch
        import torch.distributed as dist

        bucket: list[Tensor] = []
        for index, tensor in enumerate(tensors):
            bucket.append(tensor)
            if sum(t.numel() for t in bucket) < BUCKET and index + 1 < len(tensors):
                continue
            flat = torch.cat([t.flatten() for t in bucket])
            dist.all_reduce(flat)
            for whole, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                whole.copy_(part.view_as(whole))
            bucket = []

    def wait(self) -> None:
        """Return when all ranks have come here."""
        if self.size > 1:
            import torch.distributed as dist

            dist.barrier()


ALONE = Ranks()


def run_ranks(work: Callable[[Ranks, Progress], R], count: int, *, gpus: float = 0.0, progress: Progress = silent) -> R:
    """Call `work` in `count` ranks and return what the first one returns.

    Args:
        work: importable (it is sent to other processes); repeatable, since a lost rank means that all begin again.
        count: how many ranks; each gets a core.
        gpus: GPUs that each of them gets; without any, one rank works in this process.
        progress: called with what the first rank reports.

    Raises:
        Exception: what the work raised, as itself.
        ValueError: Ray has fewer GPUs.
        TransientError: ranks were lost again and again, or Ray did not start.
    """
    if count == 1 and not gpus:
        return work(ALONE, progress)
    with session(num_cpus=max(os.cpu_count() or 1, count)) as connection:
        for attempt in range(RESTARTS + 1):
            try:
                result: R = _Group(connection, work, count, gpus).run(progress)
                return result
            except _LostRankError as error:
                if attempt == RESTARTS:
                    raise TransientError(f"lost a training process {attempt + 1} times ({error})") from error
                log.warning("a training process was lost (%s); all go on from the last checkpoint", error)
    raise AssertionError("unreachable")


class _LostRankError(Exception):
    """A process is gone; the others cannot go on without it."""


class _Rank:
    """One process; Ray lets `seen` be called while `run` runs."""

    def __init__(self) -> None:
        self._seen: Report | None = None
        self._store: Any = None

    def open_store(self) -> tuple[str, int]:
        """Where the ranks meet: an address of this process."""
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        host = node_address()
        self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        return host, int(self._store.port)

    def run(
        self, work: Callable[[Ranks, Progress], R], ranks: Ranks, place: tuple[str, int] | None, backend: str
    ) -> R | None:
        """The work; its result from the first rank alone."""
        with nullcontext() if place is None else process_group(ranks, place, self._store, backend=backend):
            result = work(ranks, self._listen if ranks.is_first else silent)
        return result if ranks.is_first else None

    def seen(self) -> Report | None:
        """The latest progress."""
        return self._seen

    def _listen(self, done: int, total: int, figures: Mapping[str, float]) -> None:
        self._seen = done, total, dict(figures)


@contextmanager
def process_group(ranks: Ranks, place: tuple[str, int], store: Any = None, *, backend: str = "gloo") -> Iterator[None]:
    """Join the group of all ranks at `place`; leave it in the end, unless NCCL could not after an error."""
    import torch.distributed as dist
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    host, port = place
    meeting = store or TCPStore(host, port, is_master=False)
    dist.init_process_group(backend, store=meeting, rank=ranks.rank, world_size=ranks.size)
    try:
        yield
    except BaseException:
        # A group of NCCL is left together: this rank would wait for those that wait for it, its error untold.
        if backend != "nccl":
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


class _Group:
    """The actors of one attempt."""

    def __init__(
        self, connection: Session, work: Callable[[Ranks, Progress], Any], count: int, gpus: float = 0.0
    ) -> None:
        self.ray = connection.connect(cpus=1, gpus=gpus, processes=count)
        there = self.ray.cluster_resources().get("GPU", 0)
        if there < gpus * count and not connection.address:  # a cluster that is joined may grow
            raise ValueError(f"{count} processes need a GPU each, and this machine has {there:g}: lower --ranks")
        self.backend = "nccl" if gpus else "gloo"
        remote = self.ray.remote(num_cpus=1, num_gpus=gpus, max_concurrency=2)(_Rank)
        self.work = work
        self.actors = [remote.remote() for _ in range(count)]

    def run(self, progress: Progress) -> Any:
        try:
            return self._run(progress)
        finally:
            for actor in self.actors:
                self.ray.kill(actor)

    def _run(self, progress: Progress) -> Any:
        count = len(self.actors)
        place = None if count == 1 else self._get(self.actors[0].open_store.remote())
        calls = [a.run.remote(self.work, Ranks(rank, count), place, self.backend) for rank, a in enumerate(self.actors)]
        pending, last = list(calls), None
        while pending:
            with interruptible():
                ready, pending = self.ray.wait(pending, num_returns=1, timeout=WAIT_SECONDS)
            if pending and (seen := self._seen()) is not None and seen != last:
                last = seen
                progress(*seen)
            if any(self._error(call) is not None for call in ready):
                self._fail(calls)
        return self._get(calls[0])

    def _seen(self) -> Report | None:
        try:
            with interruptible():
                found: Report | None = self.ray.get(self.actors[0].seen.remote(), timeout=WAIT_SECONDS)
        except (self.ray.exceptions.RayError, TimeoutError):
            return None  # if it is lost, its call says so
        return found

    def _fail(self, calls: list[Any]) -> None:
        """Raise what went wrong first: a lost process, else an error of the work; not what followed from it."""
        deadline = time.monotonic() + GRACE_SECONDS
        pending = calls
        while pending and time.monotonic() < deadline:
            with interruptible():
                _, pending = self.ray.wait(pending, num_returns=len(pending), timeout=WAIT_SECONDS)
        done = [call for call in calls if call not in pending]
        errors = [error for call in done if (error := self._error(call)) is not None]
        lost = next((e for e in errors if not isinstance(e, self.ray.exceptions.RayTaskError)), None)
        if lost is not None:
            raise _LostRankError(one_line(lost)) from lost
        causes = [e.cause if isinstance(e.cause, Exception) else RuntimeError(one_line(e)) for e in errors]
        raise next((c for c in causes if not _is_of_the_group(c)), causes[0])

    def _error(self, call: Any) -> Any:
        try:
            with interruptible():
                self.ray.get(call)
        except self.ray.exceptions.RayError as error:
            return error
        return None

    def _get(self, call: Any) -> Any:
        try:
            with interruptible():
                return self.ray.get(call)
        except self.ray.exceptions.RayActorError as error:
            raise _LostRankError(one_line(error)) from error


def _is_of_the_group(error: Exception) -> bool:
    """Whether an error may only say that another rank has left the group."""
    from torch.distributed import DistError

    text = str(error)
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and ("gloo" in text or "NCCL" in text))
