"""What a rank does, and the errors by which the controller tells the work's own from those of a lost process."""

import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import ray.train
from ray import cloudpickle

from infra.compute.cluster import one_line
from infra.progress import Progress, silent

R = TypeVar("R")
Work = Callable[[int, int, Progress], R]  # of a rank, the number of ranks, and where to report

GRACE_SECONDS = 10.0  # for the cause of a broken process group to be seen before its consequence


class WorkError(Exception):
    """An error of the work itself, pickled by the rank, since the controller may not know its class."""

    def __init__(self, pickled: bytes) -> None:
        super().__init__(pickled)
        self.pickled = pickled

    @classmethod
    def of(cls, error: Exception) -> "WorkError":
        """Wrap an error; one that does not survive pickling is replaced by its last line."""
        try:
            pickled = cloudpickle.dumps(error)
            cloudpickle.loads(pickled)
        except Exception:
            pickled = cloudpickle.dumps(RuntimeError(one_line(error)))
        return cls(pickled)

    def original(self) -> Exception:
        """Return the error as it was raised."""
        error: Exception = cloudpickle.loads(self.pickled)
        return error


class GroupBrokenError(Exception):
    """The process group failed without a cause that anybody saw, as when a network is cut."""


class RankWork:
    """Callable that Ray Train calls in each rank."""

    def __init__(self, work: Work[Any], messenger: Any) -> None:
        self.work, self.messenger = work, messenger

    def __call__(self) -> bytes | None:
        """Do the work; only the first rank returns its result, pickled, since the controller may not know its class."""
        context = ray.train.get_context()
        rank, size = context.get_world_rank(), context.get_world_size()
        reporter = _Reporter(self.messenger)
        try:
            result = self.work(rank, size, silent if rank else reporter)
        except Exception as error:
            if _is_group_error(error):
                time.sleep(GRACE_SECONDS)  # the rank that caused this is seen first, and ends this process
                raise GroupBrokenError(one_line(error)) from None
            raise WorkError.of(error) from None
        reporter.flush()
        return None if rank else cloudpickle.dumps(result)


class _Reporter:
    """Progress callback of the first rank."""

    def __init__(self, messenger: Any) -> None:
        self._messenger, self._last = messenger, None

    def __call__(self, done: int, total: int, figures: Mapping[str, float]) -> None:
        self._last = self._messenger.report.remote(done, total, dict(figures))

    def flush(self) -> None:
        """Wait until all reports have arrived."""
        if self._last is not None:
            ray.get(self._last)


def _is_group_error(error: Exception) -> bool:
    """Tell whether an error may only mean that another rank has left the process group."""
    from torch.distributed import DistError

    text = str(error)
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and ("gloo" in text or "NCCL" in text))
