"""Which entry goes into which shard: by hashes of its image id, never by the order of a listing."""

import hashlib
import logging
from collections.abc import Sequence
from typing import NamedTuple, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from infra.shards import shard_name, split_of
from sftok.config import DataConfig
from sftok.source_entries import SPLITS, Entries, Source, values

log = logging.getLogger(__name__)

LARGE_SHARD = 2**30  # bytes


class ShardJob(NamedTuple):
    """The entries of one shard: a unit of work that needs nothing of the others."""

    name: str
    split: str
    entries: Entries


class ShardJobs(Sequence[ShardJob]):
    """One job a bucket of each split, also for empty ones; made when it is asked for."""

    def __init__(self, entries: Entries, order: np.ndarray, starts: np.ndarray, names: Sequence[str]) -> None:
        self.entries, self.order, self.starts, self.names = entries, order, starts, names

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> ShardJob: ...
    @overload
    def __getitem__(self, index: slice) -> list[ShardJob]: ...
    def __getitem__(self, index: int | slice) -> ShardJob | list[ShardJob]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        chosen = self.order[self.starts[at] : self.starts[at + 1]]
        return ShardJob(self.names[at], split_of(self.names[at]) or "", self.entries.take(pa.array(chosen)))


def plan_shards(source: Source, config: DataConfig) -> ShardJobs:
    """Divide the entries into splits, where the source has none, and into hash buckets.

    Raises:
        ValueError: for two entries with the same image id.
    """
    entries = Entries.of(source.entries).sorted()
    if (at := pc.index(entries.repeated(), True).as_py()) >= 0:
        raise ValueError(f"source {source.uri!r} holds image id {entries[at].image_id!r} twice: image ids are unique")
    hashes, draws = _hashes(entries)
    is_val = _held_out(entries, draws, config) | _equals(entries.column("split"), "val")
    shards = np.where(is_val, config.num_shards + hashes % config.num_val_shards, hashes % config.num_shards)
    counts = {"train": config.num_shards, "val": config.num_val_shards}
    names = [shard_name(split, index, counts[split]) for split in SPLITS for index in range(counts[split])]
    sizes = np.bincount(shards.astype(np.int64), weights=entries.column("size").to_numpy(), minlength=len(names))
    if sizes.max() > LARGE_SHARD:
        log.warning(
            "a shard of %.1f GB is held in memory while it is written: raise data.num_shards", sizes.max() / 1e9
        )
    order = np.argsort(shards, kind="stable")
    starts = np.searchsorted(shards[order], np.arange(len(names) + 1))
    return ShardJobs(entries, order, starts, names)


def _hashes(entries: Entries) -> tuple[np.ndarray, np.ndarray]:
    """Two independent draws from each image id: an integer for its bucket, a number in [0, 1) for its split."""
    hashes, draws = np.empty(len(entries), np.uint64), np.empty(len(entries), np.float64)
    for at, image_id in enumerate(values(entries.column("image_id"))):
        digest = hashlib.sha256(image_id.encode()).digest()
        hashes[at] = int.from_bytes(digest[:8], "big")
        draws[at] = int.from_bytes(digest[8:16], "big") / 2**64
    return hashes, draws


def _held_out(entries: Entries, draws: np.ndarray, config: DataConfig) -> np.ndarray:
    """The val images of a source without splits; of a small one at least the image that comes first by hash."""
    is_free = pc.and_(pc.is_null(entries.column("split")), pc.is_null(entries.column("problem"))).to_numpy()
    held_out: np.ndarray = is_free & (draws < config.val_fraction)
    if is_free.any() and not held_out.any():
        held_out[np.where(is_free, draws, np.inf).argmin()] = True
    return held_out


def _equals(column: pa.ChunkedArray, value: str) -> np.ndarray:
    equal: np.ndarray = pc.fill_null(pc.equal(column, value), False).to_numpy()
    return equal
