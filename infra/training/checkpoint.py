"""Save and load checkpoints of a training run: tensors first, marker last, so that a kill in between does no harm."""

import hashlib
import json
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from pydantic import JsonValue

from infra.config import Config
from infra.store.store import Store

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

MARKER = "checkpoint.json"
FOLDER = "step-"
CHECKPOINTS = "checkpoints"
"""Folder of an artifact that holds the checkpoints of its training."""


class Checkpoint(NamedTuple):
    """A state to resume from."""

    step: int
    """completed steps."""
    tensors: "dict[str, Tensor]"
    """on the CPU."""
    state: dict[str, JsonValue]


class CheckpointFile(Config):
    """checkpoint.json: the marker, whose existence means that the checkpoint is complete."""

    step: int
    file: str
    sha256: str
    state: dict[str, JsonValue]


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: holds these checkpoints and nothing else.
        keep: number of newest checkpoints to keep; with 2 or more, a corrupted one leaves another to resume from.
    """

    def __init__(self, folder: Store, keep: int = 1) -> None:
        if keep < 1:
            raise ValueError(f"keep = {keep}: at least one checkpoint has to be kept")
        self.folder, self.keep = folder, keep
        self._unreadable: set[int] = set()

    def save(self, step: int, tensors: "Mapping[str, Tensor]", state: Mapping[str, JsonValue]) -> None:
        """Write a checkpoint, mark it as complete, then remove all but the newest `keep`."""
        from safetensors.torch import save

        data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        sha256 = hashlib.sha256(data).hexdigest()
        folder = self.folder.at(_name(step))
        if step in self._unreadable:
            folder.delete(MARKER)
        # Named by content, so that a second writer of the same step cannot change what the first one's marker covers.
        file = f"{sha256[:16]}.safetensors"
        folder.write(file, data)
        marker = CheckpointFile(step=step, file=file, sha256=sha256, state=dict(state))
        if not folder.create(MARKER, json.dumps(marker.model_dump(), indent=1).encode()):
            log.info("%s was already saved by another run", folder.uri)
            file = CheckpointFile.model_validate_json(folder.read(MARKER)).file
        for leftover in set(folder.list()) - {MARKER, file}:
            folder.delete(leftover)
        self._unreadable.discard(step)
        self._prune(step)

    def latest(self) -> Checkpoint | None:
        """Load the newest complete checkpoint with a matching hash; damaged ones are skipped with a warning."""
        for step in reversed(self._marked()):
            try:
                return self._load(step)
            except (FileNotFoundError, ValueError) as error:
                log.warning("skipping the damaged %s: %s", self.folder.at(_name(step)).uri, str(error).splitlines()[0])
                self._unreadable.add(step)
        return None

    def clear(self) -> None:
        """Remove all checkpoints."""
        for name in self._folders():
            self._remove(name)

    def _load(self, step: int) -> Checkpoint:
        from safetensors.torch import load

        folder = self.folder.at(_name(step))
        marker = CheckpointFile.model_validate_json(folder.read(MARKER))
        data = folder.read(marker.file)
        if hashlib.sha256(data).hexdigest() != marker.sha256:
            raise ValueError(f"{folder.uri}/{marker.file} does not match {MARKER}")
        return Checkpoint(marker.step, load(data), dict(marker.state))

    def _marked(self) -> list[int]:
        """List steps with a marker, ascending."""
        names = (key.removesuffix(f"/{MARKER}") for key in self.folder.list(FOLDER) if key.endswith(f"/{MARKER}"))
        return sorted(int(name.removeprefix(FOLDER)) for name in names)

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
