"""Storage of torch.distributed.checkpoint: one safetensors file per rank and a marker in JSON, no pickle.

torch plans which rank writes which tensor or chunk, and which stored chunks a rank needs; the files and the marker are
ours. A file is named by its content, and its hash is in the marker, which is written last.
"""

import hashlib
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from pydantic import JsonValue
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from infra.store.store import Store
from infra.training.marker import (
    MARKER,
    Chunk,
    Marker,
    StoredTensor,
    file_name,
    marker_bytes,
    read_marker,
    tensor_key,
)
from infra.training.rank_group import sendable
from infra.training.staging import DTYPES, NAMES, Staging

log = logging.getLogger(__name__)

T = TypeVar("T")


class Written(NamedTuple):
    """Where a rank has put a chunk."""

    chunk: Chunk
    sha256: str


class ShardWriter(StorageWriter):
    """Writer of one checkpoint.

    Args:
        folder: the checkpoint's own.
        staging: holds the tensors that this rank writes.
        step: completed steps.
        state: what the marker holds besides the tensors.
        is_replaced: whether a marker that is there is damaged.
    """

    def __init__(
        self, folder: Store, staging: Staging, step: int, state: Mapping[str, JsonValue], *, is_replaced: bool
    ) -> None:
        self.folder, self.staging = folder, staging
        self.step, self.state, self.is_replaced = step, state, is_replaced

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: object) -> bool:  # noqa: ARG003
        """Refuse to be chosen by the name of a folder."""
        return False

    def reset(self, checkpoint_id: object = None) -> None:
        """Do nothing: a writer is made for one checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Do nothing: a store makes its folders itself."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Accept the plan."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Accept the plans."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:  # noqa: ARG002
        """Write this rank's tensors and chunks as one file; none if they have no elements."""
        keys: dict[str, str] = {}
        places = {}
        for item in plan.items:
            assert item.tensor_data is not None
            box = item.tensor_data.chunk
            if all(box.sizes):
                places[item.index] = Chunk(offsets=tuple(box.offsets), sizes=tuple(box.sizes), file="")
                keys[item.index.fqn] = tensor_key(item.index.fqn, places[item.index], tuple(item.tensor_data.size))
        if not keys:
            return _done([])
        with sendable():
            data = self.staging.file(keys)
            sha256 = hashlib.sha256(data).hexdigest()
            file = file_name(sha256)
            self.folder.write(file, data)
        written = {index: Written(place.model_copy(update={"file": file}), sha256) for index, place in places.items()}
        return _done([WriteResult(index, len(data), place) for index, place in written.items()])

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Create the marker, when all ranks have written, and remove the files that it does not list."""
        with sendable():
            chunks: dict[str, list[Chunk]] = {name: [] for name in metadata.state_dict_metadata}
            files = {}
            for result in (result for rank in results for result in rank):
                written: Written = result.storage_data
                chunks[result.index.fqn].append(written.chunk)
                files[written.chunk.file] = written.sha256
            tensors = {}
            for name, entry in metadata.state_dict_metadata.items():
                assert isinstance(entry, TensorStorageMetadata)
                dtype, shape = NAMES[entry.properties.dtype], tuple(entry.size)
                tensors[name] = StoredTensor(dtype=dtype, shape=shape, chunks=tuple(chunks[name]))
            marker = Marker(step=self.step, files=files, tensors=tensors, state=dict(self.state))
            if self.is_replaced:
                self.folder.delete(MARKER)
            if not self.folder.create(MARKER, marker_bytes(marker)):
                log.info("%s was already saved by another run", self.folder.uri)
                marker = read_marker(self.folder)
            for leftover in set(self.folder.list()) - {MARKER, *marker.files}:
                self.folder.delete(leftover)


class ShardReader(StorageReader):
    """Reader of the checkpoint that a marker describes."""

    def __init__(self, folder: Store, marker: Marker) -> None:
        self.folder, self.marker = folder, marker
        self._chunks: dict[MetadataIndex, tuple[str, Chunk]] = {}

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: object) -> bool:  # noqa: ARG003
        """Refuse to be chosen by the name of a folder."""
        return False

    def reset(self, checkpoint_id: object = None) -> None:
        """Do nothing: a reader is made for one checkpoint."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Return what the marker says, in torch's terms."""
        found: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        for name, tensor in self.marker.tensors.items():
            boxes = [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in tensor.chunks]
            found[name] = TensorStorageMetadata(TensorProperties(DTYPES[tensor.dtype]), torch.Size(tensor.shape), boxes)
            for chunk in tensor.chunks:
                self._chunks[MetadataIndex(name, chunk.offsets)] = tensor_key(name, chunk, tensor.shape), chunk
        return Metadata(found)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Do nothing: files are opened when they are needed."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Accept the plan."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Accept the plans."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the files that hold planned chunks, one after the other, and copy the planned parts of them.

        Raises:
            FileNotFoundError, ValueError: a file is missing, or is not what the marker says.
        """
        of_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            of_file.setdefault(self._chunks[item.storage_index][1].file, []).append(item)
        with sendable():
            for file, items in of_file.items():
                tensors = self._read(file)
                for item in items:
                    stored = self._stored(item.storage_index, tensors)
                    for axis, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                        stored = stored.narrow(axis, start, length)
                    target = planner.resolve_tensor(item)
                    target.copy_(stored)
                    planner.commit_tensor(item, target)
        return _done(None)

    def _read(self, file: str) -> dict[str, Tensor]:
        data = self.folder.read(file)
        if hashlib.sha256(data).hexdigest() != self.marker.files[file]:
            raise ValueError(f"{self.folder.uri}/{file} does not match {MARKER}")
        try:
            return load(data)
        except SafetensorError as error:
            raise ValueError(f"{self.folder.uri}/{file}: {error}") from error

    def _stored(self, index: MetadataIndex, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return a stored chunk; the marker has no hash of its own, so it may be wrong about a file that is whole."""
        key, chunk = self._chunks[index]
        stored, dtype = tensors.get(key), self.marker.tensors[index.fqn].dtype
        if stored is None or stored.shape != chunk.sizes or stored.dtype != DTYPES[dtype]:
            raise ValueError(f"{self.folder.uri}/{chunk.file} does not hold {key!r} as {MARKER} says")
        return stored


def _done(result: T) -> Future[T]:
    future: Future[T] = Future()
    future.set_result(result)
    return future
