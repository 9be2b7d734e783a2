"""Shuffle entries to their shards without holding them all in one process: deal batches into bins, then gather bins.

A batch of the listing is dealt into bins by the hash of each image id, as a file with one segment per bin. A worker
that gathers a bin reads its segments of all batches, and so has all entries of the bin's shards and all repetitions of
their image ids. It writes a segment per shard. The files are deleted once the images are written.
"""

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from infra.errors import TransientError
from infra.store.store import Store
from sftok.config import DataConfig
from sftok.sources.listing import Entries, EntryBatch, values

READERS = 8  # segments read at once: on S3 each is a request
_OFFSET = np.dtype("<i8")
_COMPRESSED = pa.ipc.IpcWriteOptions(compression="zstd")


class Deal(NamedTuple):
    """Parameters of dealing entries."""

    config: DataConfig
    folder: Store
    bins: int
    by_name: bool  # image ids are the entries' preferred names

    def file(self, batch: int) -> str:
        """Name the file of a batch; files are spread over folders, since S3 limits requests per second and prefix."""
        return f"{batch % 256:02x}/part-{batch:06d}"

    def bin_file(self, number: int) -> str:
        """Name the file of a bin's entries, sorted by shard."""
        return f"bin-{number:06d}"

    def open(self, name: str) -> BinaryIO:
        """Open one of the files.

        Raises:
            TransientError: it is gone, because another run has finished these images.
        """
        try:
            return self.folder.open(name)
        except FileNotFoundError as error:
            raise TransientError(f"{self.folder.uri}/{name} is gone: another run prepared the same images") from error

    def shards(self, number: int) -> tuple[range, range]:
        """Return the train and the val shards of a bin."""
        counts = self.config.num_shards, self.config.num_val_shards
        train, val = (range(number, count, self.bins) for count in counts)
        return train, val


class DealResult(NamedTuple):
    """Summary of a dealt batch."""

    is_named: bool = True  # every image has a preferred name; if not, dealing by name stopped here
    class_names: frozenset[str] = frozenset()
    is_held_out: bool = False  # an image is held out by its hash
    least: tuple[float, str] | None = None  # of the images without a stated split: the first by hash


class BinResult(NamedTuple):
    """A bin's shards, train first: the ends of their segments in its file, and the bytes of their images."""

    ends: np.ndarray
    sizes: np.ndarray
    is_unique: bool = True  # with by_name: no two images have the same name


class Dealer:
    """A worker that deals one batch per call."""

    def __init__(self, deal: Deal) -> None:
        self.deal = deal

    def __call__(self, batch: EntryBatch) -> DealResult:
        """Write the batch's file."""
        deal, entries = self.deal, batch.read()
        if deal.by_name:
            named = _named(entries)
            if named is None:
                return DealResult(is_named=False)
            entries = named
        hashes, draws = hashes_of(entries)
        bins = (hashes % np.uint64(deal.bins)).astype(np.int64)
        data, ends = _packed(_divided(entries, bins, deal.bins))
        deal.folder.write(deal.file(batch.number), ends.tobytes() + data)
        is_free = free(entries)
        held_out = is_free & (draws < deal.config.val_fraction)
        least = None
        if is_free.any() and not held_out.any():
            at = int(np.where(is_free, draws, np.inf).argmin())
            least = float(draws[at]), entries[at].image_id
        classes = pc.unique(entries.column("class_name")).drop_null().to_pylist()
        return DealResult(True, frozenset(classes), bool(held_out.any()), least)


class Gatherer:
    """A worker that gathers one bin per call."""

    def __init__(self, deal: Deal, batches: int, held_out: str | None) -> None:
        """Gather from so many batches; `held_out` is an image id that is held out whatever its hash."""
        self.deal, self.batches, self.held_out = deal, batches, held_out

    def __call__(self, number: int) -> BinResult:
        """Write the bin's file."""
        deal = self.deal
        entries = Entries.join(self._read(number))
        if deal.by_name and pc.any(entries.sorted().repeated()).as_py():
            return BinResult(np.empty(0), np.empty(0), is_unique=False)
        entries = entries.without_repetitions()
        train, val = deal.shards(number)
        hashes, draws = hashes_of(entries)
        is_val = free(entries) & (draws < deal.config.val_fraction) | equals(entries, "split", "val")
        if self.held_out is not None:
            is_val |= free(entries) & equals(entries, "image_id", self.held_out)
        config, bins = deal.config, np.uint64(deal.bins)
        in_train = hashes % np.uint64(config.num_shards) // bins
        in_val = hashes % np.uint64(config.num_val_shards) // bins
        shards = np.where(is_val, in_val + np.uint64(len(train)), in_train).astype(np.int64)
        count = len(train) + len(val)
        data, ends = _packed(_divided(entries, shards, count))
        deal.folder.write(deal.bin_file(number), data)
        sizes = np.bincount(shards, weights=entries.column("size").to_numpy(), minlength=count)
        return BinResult(ends, sizes)

    def _read(self, number: int) -> Iterator[Entries]:
        """Read the bin's segments, several at once, since each is a request."""
        with ThreadPoolExecutor(READERS, thread_name_prefix="gather") as pool:
            for at in range(0, self.batches, READERS):
                some = range(at, min(at + READERS, self.batches))
                yield from pool.map(lambda batch: self._segment(batch, number), some)

    def _segment(self, batch: int, number: int) -> Entries:
        with self.deal.open(self.deal.file(batch)) as file:
            head = self.deal.bins * _OFFSET.itemsize
            ends = np.frombuffer(file.read(head), _OFFSET)
            start = int(ends[number - 1]) if number else 0
            file.seek(head + start)
            return unpacked(file.read(int(ends[number]) - start))


def unpacked(data: bytes) -> Entries:
    """Read the entries of a segment."""
    return Entries(pa.ipc.open_stream(data).read_all()) if data else Entries.of(())


def _divided(entries: Entries, places: np.ndarray, count: int) -> Iterator[Entries]:
    """Divide entries by place, keeping their order."""
    order = np.argsort(places, kind="stable")
    starts = np.searchsorted(places[order], np.arange(count + 1))
    for start, end in itertools.pairwise(starts.tolist()):
        yield entries.take(pa.array(order[start:end]))


def _packed(pieces: Iterable[Entries]) -> tuple[bytes, np.ndarray]:
    """Concatenate segments, and return the end of each; a segment without entries has no bytes."""
    segments = []
    for entries in pieces:
        sink = pa.BufferOutputStream()
        if len(entries):
            with pa.ipc.new_stream(sink, entries.table.schema, options=_COMPRESSED) as writer:
                writer.write_table(entries.table)
        segments.append(sink.getvalue().to_pybytes())
    return b"".join(segments), np.cumsum([len(segment) for segment in segments], dtype=_OFFSET)


def _named(entries: Entries) -> Entries | None:
    """Set image ids to the preferred names; None if an image has none."""
    is_good = pc.is_null(entries.column("problem"))
    names = entries.column("name")
    if pc.any(pc.and_(is_good, pc.is_null(names))).as_py():
        return None
    return entries.with_column("image_id", pc.if_else(is_good, names, entries.column("image_id")))


def hashes_of(entries: Entries) -> tuple[np.ndarray, np.ndarray]:
    """Hash image ids to two independent draws: an integer for the bucket, and a number in [0, 1) for the split."""
    hashes, draws = np.empty(len(entries), np.uint64), np.empty(len(entries), np.float64)
    for at, image_id in enumerate(values(entries.column("image_id"))):
        digest = hashlib.sha256(image_id.encode()).digest()
        hashes[at] = int.from_bytes(digest[:8], "big")
        draws[at] = int.from_bytes(digest[8:16], "big") / 2**64
    return hashes, draws


def free(entries: Entries) -> np.ndarray:
    """Mark images without a stated split."""
    no_split, no_problem = pc.is_null(entries.column("split")), pc.is_null(entries.column("problem"))
    is_free: np.ndarray = pc.and_(no_split, no_problem).to_numpy()
    return is_free


def equals(entries: Entries, column: str, value: str) -> np.ndarray:
    """Mark entries with a value in a column."""
    equal: np.ndarray = pc.fill_null(pc.equal(entries.column(column), value), False).to_numpy()
    return equal
