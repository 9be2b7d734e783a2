"""Run data-parallel training: several processes (ranks) do the same work and share each step's micro-batches.

Ranks are workers of Ray Train, one per GPU or core. If one is lost, all are restarted, and the work resumes from its
last checkpoint. A single rank on CPUs works in this process; on a GPU it has its own process, which frees the card's
memory when it ends.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from infra.compute.cluster import session
from infra.compute.rank_count import ONE, RankCount
from infra.progress import Progress, silent
from infra.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

R = TypeVar("R")


class Ranks(NamedTuple):
    """This process's rank and the number of ranks (the world size)."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Tell whether this is rank 0, which writes the results of all."""
        return self.rank == 0

    def share(self, parts: int) -> range:
        """Return the indices of this rank's share of a step's `parts` equal parts; shares differ by one at most.

        Raises:
            ValueError: there are more ranks than parts.
        """
        if parts < self.size:
            raise ValueError(
                f"{parts} micro-batches per step cannot be shared by {self.size} ranks; lower --ranks, or set "
                "training.micro_batch so that a batch holds more of them"
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

    def spread_(self, tensor: "Tensor") -> None:
        """Replace every rank's `tensor` by the first one's."""
        if self.size > 1:
            import torch.distributed as dist

            dist.broadcast(tensor, src=0)

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


def run_ranks(
    work: Callable[[Ranks, Progress], R],
    count: RankCount | int | str,
    *,
    gpus: float = 0.0,
    progress: Progress = silent,
) -> R:
    """Call `work` in `count` ranks and return the first rank's result.

    Args:
        work: importable, since it is sent to other processes; idempotent, since a lost rank restarts them all.
        count: number of ranks, or a range: then as many as there is room for, and after a loss as many as are left.
            Each gets a core.
        gpus: GPUs per rank; with 0, a single rank works in this process.
        progress: called with the first rank's reports.

    Raises:
        Exception: any error that the work raised, unchanged.
        ValueError: Ray has too few GPUs, and does not get more in time.
        TransientError: ranks were lost repeatedly, or Ray did not start.
    """
    count = RankCount.parse(count)
    if count == ONE and not gpus:
        return work(ALONE, progress)
    settings = Settings()
    with session() as connection:
        connection.connect(cpus=1, gpus=gpus, processes=count.most)
        connection.check_room(cpus=1, gpus=gpus, processes=count.least)
        from infra.compute.launch.room import Room
        from infra.compute.launch.train import train

        room = Room(count, gpus, settings.ray_wait, is_joined=bool(connection.address))
        return train(partial(_in_rank, work), room, progress=progress, patience=settings.rank_patience)


def _in_rank(work: Callable[[Ranks, Progress], R], rank: int, size: int, progress: Progress) -> R:
    return work(Ranks(rank, size), progress)
