"""Save and load checkpoints of a training run: files first, marker last, so that a kill in between does no harm.

A save copies the state into memory and returns; a thread writes it while training goes on. Every rank writes its part,
and any number of ranks can load it.
"""

import logging
import re
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self

from pydantic import JsonValue

from infra.compute.ranks import ALONE, Ranks
from infra.store.store import Store
from infra.training.marker import DAMAGE, MARKER, read_marker

if TYPE_CHECKING:
    from torch import Tensor

    from infra.training.rank_group import RankGroup
    from infra.training.sharded_files import ShardWriter
    from infra.training.staging import Staging

log = logging.getLogger(__name__)

FOLDER = "step-"
CHECKPOINTS = "checkpoints"
"""Folder of an artifact that holds the checkpoints of its training."""


class Restored(NamedTuple):
    """What a checkpoint holds besides the tensors."""

    step: int
    """completed steps."""
    state: dict[str, JsonValue]


class Checkpoints:
    """The checkpoints of one run; `save`, `wait` and `load_into` are called by all ranks together.

    As a context manager it waits at the end for what is being written, also after an error of the training, but not
    when the process is asked to end.

    Args:
        folder: holds these checkpoints and nothing else.
        keep: number of newest checkpoints to keep; with 2 or more, a corrupted one leaves another to resume from.
        ranks: that train together.
    """

    def __init__(self, folder: Store, keep: int = 1, ranks: Ranks = ALONE) -> None:
        if keep < 1:
            raise ValueError(f"keep = {keep}: at least one checkpoint has to be kept")
        self.folder, self.keep, self.ranks = folder, keep, ranks
        self._unreadable: set[int] = set()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._staging: Staging | None = None

    def save(
        self,
        step: int,
        tensors: "Mapping[str, Tensor]",
        state: Mapping[str, JsonValue],
        *,
        beside: Callable[[], None] | None = None,
    ) -> None:
        """Copy the state, and write it, mark it as complete and remove all but the newest `keep` in a thread.

        Args:
            step: completed steps.
            tensors: plain ones, equal on all ranks, or DTensors; they may change once this returns.
            state: equal on all ranks.
            beside: called by the first rank's thread in the end, to write what else belongs to this step.

        Raises:
            Exception: the save before has failed.
        """
        from infra.training.sharded_files import ShardWriter
        from infra.training.staging import Staging, share_out

        self.wait()
        self._staging = self._staging or Staging()
        own = {name: tensors[name] for name in share_out(tensors, self.ranks.rank, self.ranks.size)}
        self._staging.copy(own)
        is_replaced = step in self._unreadable
        writer = ShardWriter(self._at(step), self._staging, step, dict(state), is_replaced=is_replaced)
        self._writing = self._thread.submit(self._write, self._group, writer, own, beside)

    def wait(self) -> None:
        """Wait until the last save is complete, and raise its error if it has failed."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def load_into(self, tensors: "Mapping[str, Tensor]", optional: Collection[str] = ()) -> Restored | None:
        """Fill tensors from the newest complete checkpoint; damaged ones are skipped with a warning.

        Args:
            tensors: of the right shapes; changed only if a checkpoint could be loaded, which need not have been saved
                by as many ranks, or with the same tensors sharded.
            optional: names that a checkpoint may lack: these tensors then stay as they are.

        Returns:
            The rest of the state; None if there is no checkpoint, or none that is whole.
        """
        self.wait()
        for step in reversed(self._group.of_first(self._marked)):
            try:
                return self._load(step, tensors, optional)
            except DAMAGE as error:
                level = logging.WARNING if self.ranks.is_first else logging.DEBUG
                log.log(level, "skipping the damaged %s: %s", self._at(step).uri, str(error).splitlines()[0])
                self._unreadable.add(step)
        return None

    def clear(self) -> None:
        """Remove all checkpoints."""
        for name in self._folders():
            self._remove(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if error is None or isinstance(error, Exception):
                self.wait()
        except Exception:
            if error is None:
                raise
            log.warning("the last checkpoint was not written", exc_info=True)
        finally:
            self._thread.shutdown(wait=False)

    @cached_property
    def _group(self) -> "RankGroup":
        from infra.training.rank_group import RankGroup

        return RankGroup(self.ranks)

    def _write(
        self,
        group: "RankGroup",
        writer: "ShardWriter",
        tensors: "Mapping[str, Tensor]",
        beside: Callable[[], None] | None,
    ) -> None:
        group.save(writer, tensors)
        self._unreadable.discard(writer.step)
        if self.ranks.is_first:
            self._prune(writer.step)
            if beside is not None:
                beside()

    def _load(self, step: int, tensors: "Mapping[str, Tensor]", optional: Collection[str]) -> Restored:
        import torch

        from infra.training.parallel import own_part
        from infra.training.sharded_files import ShardReader
        from infra.training.staging import NAMES

        folder = self._at(step)
        marker = self._group.of_first(lambda: read_marker(folder))
        if marker.step != step:
            raise ValueError(f"its marker is that of step {marker.step}")
        if lacking := tensors.keys() - marker.tensors.keys() - set(optional):
            raise ValueError(f"it lacks {len(lacking)} tensors, {min(lacking)!r} among them")
        for name, tensor in tensors.items():
            stored = marker.tensors.get(name)
            if stored is not None and stored.dtype != NAMES[tensor.dtype]:
                raise ValueError(f"{name!r} has the type {stored.dtype}, not {NAMES[tensor.dtype]}")
        held = {name: tensor for name, tensor in tensors.items() if name in marker.tensors}
        # Into copies, so that a damaged file leaves the tensors as they are.
        copies = {n: torch.empty(own_part(t).shape, dtype=t.dtype) for n, t in held.items()}
        self._group.load(ShardReader(folder, marker), held, copies)
        for name, copied in copies.items():
            own_part(held[name]).copy_(copied)
        return Restored(marker.step, dict(marker.state))

    def _at(self, step: int) -> Store:
        return self.folder.at(_name(step))

    def _marked(self) -> list[int]:
        """List steps with a marker, ascending."""
        found = (re.fullmatch(rf"{FOLDER}(\d+)/{re.escape(MARKER)}", key) for key in self.folder.list(FOLDER))
        return sorted(int(match[1]) for match in found if match)

    def _folders(self) -> set[str]:
        """List folders of checkpoints, complete or not."""
        return {key.partition("/")[0] for key in self.folder.list(FOLDER)}

    def _prune(self, step: int) -> None:
        good = [s for s in self._marked() if s not in self._unreadable]
        kept = {_name(s) for s in [*good[-self.keep :], step]}
        for name in self._folders() - kept:
            self._remove(name)
        self._unreadable.clear()

    def _remove(self, name: str) -> None:
        folder = self.folder.at(name)
        folder.delete(MARKER)
        folder.delete_tree()


def _name(step: int) -> str:
    return f"{FOLDER}{step:09d}"
