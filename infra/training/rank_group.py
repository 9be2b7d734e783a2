"""Save and load tensors by torch.distributed.checkpoint, all ranks together."""

import logging
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter

from infra.compute.ranks import Ranks
from infra.training.marker import DAMAGE

T = TypeVar("T")

# It reports each error of a save or a load with a traceback, also those that are handled.
logging.getLogger("c10d-NullHandler-dcp_logger").setLevel(logging.CRITICAL + 1)

_groups: WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = WeakKeyDictionary()


class RankGroup:
    """Ranks with a process group of their own on CPUs: so a thread may use it while a step uses the training's."""

    def __init__(self, ranks: Ranks) -> None:
        """Make the group, with all ranks, unless this process has it already."""
        self.ranks = ranks
        self._group: dist.ProcessGroup | None = None
        if ranks.size > 1:
            world = dist.group.WORLD
            assert world is not None
            if world not in _groups:
                _groups[world] = cast(dist.ProcessGroup, dist.new_group(backend="gloo"))
            self._group = _groups[world]

    def of_first(self, make: Callable[[], T]) -> T:
        """Return on all ranks what the first one makes, or raise its error."""
        if self.ranks.size == 1:
            return make()
        made: list[T | None] = [None]
        failed: list[Exception | None] = [None]
        if self.ranks.is_first:
            try:
                with sendable():
                    made[0] = make()
            except Exception as error:
                failed[0] = error
        dist.broadcast_object_list(failed, src=0, group=self._group)
        if failed[0] is not None:
            raise failed[0]
        dist.broadcast_object_list(made, src=0, group=self._group)
        return cast(T, made[0])

    def save(self, writer: StorageWriter, tensors: Mapping[str, Tensor]) -> None:
        """Write what a writer holds, and raise the error of any rank.

        Args:
            writer: writes what torch plans.
            tensors: those that this rank writes, for their shapes and placements alone; they may change meanwhile.
        """
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        with _unwrapped():
            save(dict(tensors), storage_writer=writer, planner=planner, **self._whom())

    def load(self, reader: StorageReader, tensors: Mapping[str, Tensor], copies: Mapping[str, Tensor]) -> None:
        """Read into copies of tensors, or of this rank's parts of them, and raise the error of any rank."""
        planner = _LoadPlanner(copies)
        with _unwrapped():
            load(dict(tensors), storage_reader=reader, planner=planner, **self._whom())

    def _whom(self) -> dict[str, Any]:
        if self._group is not None:
            return {"process_group": self._group}
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        return {"no_dist": True}


class _LoadPlanner(DefaultLoadPlanner):
    """Plans by tensors, and hands out their copies."""

    def __init__(self, copies: Mapping[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._copies = copies

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._copies[index.fqn]


@contextmanager
def _unwrapped() -> Iterator[None]:
    """Raise the error of a rank itself, one that is no sign of damage first; torch gathers those of all ranks."""
    try:
        yield
    except CheckpointException as gathered:
        errors = [error for _, (error, _) in sorted(gathered.failures.items())]
        raise min(errors, key=lambda error: isinstance(error, DAMAGE)) from gathered


@contextmanager
def sendable() -> Iterator[None]:
    """Re-raise an error that cannot be sent to the other ranks as one that can: they would wait for it in vain."""
    try:
        yield
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            raise RuntimeError(f"{type(error).__name__}: {error}") from error
        raise
