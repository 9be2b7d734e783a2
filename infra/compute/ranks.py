"""Run data-parallel training: several processes (ranks) do the same work and share each step's micro-batches.

Ranks are Ray actors, one per GPU or group of cores. If one is lost, all are restarted, and the work resumes from its
last checkpoint. A single rank on CPUs works in this process; on a GPU it has its own process, which frees the card's
memory when it ends.
"""

import logging
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
WAIT_SECONDS = 0.5  # between polls of the ranks and their progress
GRACE_SECONDS = 10.0  # for the other ranks to report their errors after one has failed


class Ranks(NamedTuple):
    """This process's rank and the number of ranks (the world size)."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Tell whether this is rank 0, which writes the results of all."""
        return self.rank == 0

    def share(self, parts: int) -> range:
        """Return the indices of this rank's share of a step's `parts` equal parts.

        Raises:
            ValueError: the parts cannot be shared equally.
        """
        if parts % self.size:
            raise ValueError(
                f"{parts} micro-batches per step cannot be shared equally by {self.size} ranks; "
                "set training.micro_batch so that batch_size / micro_batch does"
            )
        return range(self.rank * parts // self.size, (self.rank + 1) * parts // self.size)

    def total(self, tensor: "Tensor", group: Any = None) -> "Tensor":
        """Return the sum of every rank's `tensor`, or of the ranks in a group; for a single rank the tensor itself."""
        if self.size == 1:
            return tensor
        import torch.distributed as dist

        summed = tensor.clone()
        dist.all_reduce(summed, group=group)
        return summed

    def all_of(self, number: int, device: str) -> list[int]:
        """Return every rank's number, in rank order."""
        import torch

        table = torch.zeros(self.size, dtype=torch.int64, device=device)
        table[self.rank] = number
        return [int(value) for value in self.total(table).tolist()]

    def wait(self) -> None:
        """Wait until all ranks have reached this call."""
        if self.size > 1:
            import torch.distributed as dist

            dist.barrier()


ALONE = Ranks()


def run_ranks(work: Callable[[Ranks, Progress], R], count: int, *, gpus: float = 0.0, progress: Progress = silent) -> R:
    """Call `work` in `count` ranks and return the first rank's result.

    Args:
        work: importable, since it is sent to other processes; idempotent, since a lost rank restarts them all.
        count: number of ranks; each gets a core.
        gpus: GPUs per rank; with 0, a single rank works in this process.
        progress: called with the first rank's reports.

    Raises:
        Exception: any error that the work raised, unchanged.
        ValueError: Ray has too few GPUs.
        TransientError: ranks were lost repeatedly, or Ray did not start.
    """
    if count == 1 and not gpus:
        return work(ALONE, progress)
    with session() as connection:
        for attempt in range(RESTARTS + 1):
            try:
                result: R = _Group(connection, work, count, gpus).run(progress)
                return result
            except _LostRankError as error:
                if attempt == RESTARTS:
                    raise TransientError(f"lost a training process {attempt + 1} times ({error})") from error
                log.warning("a training process was lost (%s); all resume from the last checkpoint", error)
    raise AssertionError("unreachable")


class _LostRankError(Exception):
    """A rank's process has died; the others cannot continue without it."""


class _Rank:
    """Actor of one rank; Ray can call `take_progress` while `run` is running."""

    def __init__(self) -> None:
        self._progress: list[Report] = []
        self._store: Any = None

    def open_store(self) -> tuple[str, int]:
        """Open the rendezvous store in this process; return its address."""
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        host = node_address()
        self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        return host, int(self._store.port)

    def run(
        self, work: Callable[[Ranks, Progress], R], ranks: Ranks, place: tuple[str, int] | None, backend: str
    ) -> R | None:
        """Do the work; only the first rank returns its result."""
        with nullcontext() if place is None else process_group(ranks, place, self._store, backend=backend):
            result = work(ranks, self._record_progress if ranks.is_first else silent)
        return result if ranks.is_first else None

    def take_progress(self) -> list[Report]:
        """Return the progress reports since the last call."""
        taken, self._progress = self._progress, []
        return taken

    def _record_progress(self, done: int, total: int, figures: Mapping[str, float]) -> None:
        self._progress.append((done, total, dict(figures)))


@contextmanager
def process_group(ranks: Ranks, place: tuple[str, int], store: Any = None, *, backend: str = "gloo") -> Iterator[None]:
    """Join the process group of all ranks at `place`, and leave it at the end, except after an error with NCCL."""
    import torch.distributed as dist
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    host, port = place
    rendezvous = store or TCPStore(host, port, is_master=False)
    dist.init_process_group(backend, store=rendezvous, rank=ranks.rank, world_size=ranks.size)
    try:
        yield
    except BaseException:
        # Leaving an NCCL group is collective: this rank would wait for the others, which wait for it, and its error
        # would never be reported.
        if backend != "nccl":
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


class _Group:
    """The rank actors of one attempt."""

    def __init__(
        self, connection: Session, work: Callable[[Ranks, Progress], Any], count: int, gpus: float = 0.0
    ) -> None:
        self.ray = connection.connect(cpus=1, gpus=gpus, processes=count)
        available = self.ray.cluster_resources().get("GPU", 0)
        if available < gpus * count and not connection.address:  # a joined cluster may grow
            raise ValueError(f"{count} processes need a GPU each, and this machine has {available:g}: lower --ranks")
        self.backend = "nccl" if gpus else "gloo"
        remote = self.ray.remote(num_cpus=1, num_gpus=gpus, max_concurrency=2)(_Rank)
        self.work = work
        self.actors = [remote.remote() for _ in range(count)]
        self._taking: Any = None  # a call of `take_progress` that has not answered

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
        pending = list(calls)
        while pending:
            with interruptible():
                ready, pending = self.ray.wait(pending, num_returns=1, timeout=WAIT_SECONDS)
            for report in self._new_progress() if pending else ():
                progress(*report)
            if any(self._error(call) is not None for call in ready):
                self._fail(calls)
        return self._get(calls[0])

    def _new_progress(self) -> list[Report]:
        if self._taking is None:
            self._taking = self.actors[0].take_progress.remote()
        try:
            with interruptible():
                reports: list[Report] = self.ray.get(self._taking, timeout=WAIT_SECONDS)
        except (self.ray.exceptions.RayError, TimeoutError):
            return []  # it is late, and asked for again; or the rank is lost, and its call to `run` raises
        self._taking = None
        return reports

    def _fail(self, calls: list[Any]) -> None:
        """Raise the root cause: a lost process, else an error of the work; not an error that followed from it."""
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
        raise next((c for c in causes if not _is_group_error(c)), causes[0])

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


def _is_group_error(error: Exception) -> bool:
    """Tell whether an error may only mean that another rank has left the process group."""
    from torch.distributed import DistError

    text = str(error)
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and ("gloo" in text or "NCCL" in text))
