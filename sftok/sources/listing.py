"""Listings of images: entries in columns, a million of them in 150 MB, and the source that they are from.

A longer listing is spooled to a temporary file while it is made, and read batch by batch.
"""

import hashlib
import io
import itertools
import json
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra.artifacts.shards import FileEntry
from infra.store.store import Store

DIGITS = "sklearn:digits"
POSSIBLE = f"a folder of images, WebDataset tars, Parquet, an index of paths (.csv, .parquet), or {DIGITS}"
REPEATED = "another entry has the same name"
_TEXT = pa.large_string()  # offsets of 64 bits: a hundred million paths are more than 2 GB
_SCHEMA = pa.schema(
    [
        ("image_id", _TEXT),
        ("size", pa.int64()),
        ("version", _TEXT),
        ("class_name", _TEXT),
        ("split", _TEXT),
        ("problem", _TEXT),
        ("file", _TEXT),
        ("offset", pa.int64()),
        ("name", _TEXT),
    ]
)
_CHUNK = 1 << 12  # entries that exist as Python objects at once
_BATCH = 1 << 18  # entries sent to a worker at once, 30 MB
_MOST_BATCHES = 1 << 14  # each bin has a segment of every batch
SPOOL_FROM = 1 << 20  # entries from which on a listing is kept in a file


class Entry(NamedTuple):
    """An item of a source, image or not."""

    image_id: str  # path within the source, with /
    size: int  # bytes
    version: str = ""  # of the file, as known from a listing: modification time or etag
    class_name: str | None = None  # as the source writes it; `class_ids.class_name` normalises it
    split: str | None = None  # None: by hash of the image id
    problem: str | None = None  # reason to reject it without reading it
    file: str = ""  # file of the bytes, if it is not the one that the image id names
    offset: int | None = None  # of the image in that file; None: the whole file
    name: str | None = None  # preferred image id, used if no two entries prefer the same


class RejectedEntryError(ValueError):
    """An entry that can never be read; the message is the reason."""


class Entries(Sequence[Entry]):
    """A sequence of entries, in columns."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> "Entries":
        """Put entries into columns, in their order."""
        if isinstance(entries, Entries):
            return entries
        following = iter(entries)
        batches = []
        while chunk := list(itertools.islice(following, _CHUNK)):
            columns = zip(zip(*chunk, strict=True), _SCHEMA, strict=True)
            batches.append(pa.record_batch([pa.array(c, field.type) for c, field in columns], schema=_SCHEMA))
        return cls(pa.Table.from_batches(batches, schema=_SCHEMA).combine_chunks())

    @classmethod
    def join(cls, parts: Iterable["Entries"]) -> "Entries":
        """Concatenate several sequences."""
        return cls(pa.concat_tables([part.table for part in (cls.of(()), *parts)]).combine_chunks())

    def sorted(self) -> "Entries":
        """Sort by the code points of image ids; of equal ones those without a problem come first, then the smaller."""
        ids = self.table["image_id"]
        if pc.all(pc.less(ids.slice(0, max(len(ids) - 1, 0)), ids.slice(1))).as_py():
            return self  # without a copy
        keys = pa.table({"id": self.table["image_id"], "is_bad": pc.is_valid(self.table["problem"])})
        keys = keys.append_column("size", self.table["size"])
        return self.take(pc.sort_indices(keys, [(name, "ascending") for name in keys.column_names]))

    def take(self, indices: pa.Array) -> "Entries":
        """Copy the entries at some indices."""
        return Entries(self.table.take(indices).combine_chunks())

    def column(self, name: str) -> pa.ChunkedArray:
        """Return all values of a field."""
        return self.table[name]

    def with_column(self, name: str, values: pa.Array | pa.ChunkedArray) -> "Entries":
        """Replace a column."""
        at = _SCHEMA.get_field_index(name)
        return Entries(self.table.set_column(at, _SCHEMA.field(at), values.cast(_SCHEMA.field(at).type)))

    def repeated(self) -> pa.ChunkedArray:
        """Mark the sorted entries without a problem that have the image id of the entry before."""
        ids = self.table["image_id"]
        same = pc.equal(ids.slice(1), ids.slice(0, max(len(ids) - 1, 0)))
        first = pa.array([False] * min(len(ids), 1), pa.bool_())
        return pc.and_(pa.chunked_array([first, *same.chunks], pa.bool_()), pc.is_null(self.table["problem"]))

    def without_repetitions(self) -> "Entries":
        """Sort, and mark all but the first of entries with the same image id as having a problem."""
        ordered = self.sorted()
        repeated = ordered.repeated()
        if not pc.any(repeated).as_py():
            return ordered
        return ordered.with_column("problem", pc.if_else(repeated, REPEATED, ordered.column("problem")))

    def __len__(self) -> int:
        return self.table.num_rows

    @overload
    def __getitem__(self, index: int) -> Entry: ...
    @overload
    def __getitem__(self, index: slice) -> "Entries": ...
    def __getitem__(self, index: int | slice) -> "Entry | Entries":
        if isinstance(index, slice):
            return self.take(pa.array(range(*index.indices(len(self))), pa.int64()))
        at = range(len(self))[index]
        return Entry(**self.table.slice(at, 1).to_pylist()[0])

    def __iter__(self) -> Iterator[Entry]:
        for batch in self.table.to_batches(max_chunksize=_CHUNK):
            yield from map(Entry._make, zip(*(column.to_pylist() for column in batch.columns), strict=True))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Entries) and self.table.equals(other.table)

    __hash__ = None  # type: ignore[assignment]


class EntryBatch(NamedTuple):
    """Some entries of a listing, held here or in Parquet files of a folder."""

    number: int
    entries: Entries | None
    folder: Store | None = None
    names: tuple[str, ...] = ()

    def read(self) -> Entries:
        """Return the entries."""
        if self.entries is not None:
            return self.entries
        assert self.folder is not None
        tables = (pq.read_table(io.BytesIO(self.folder.read(name)), schema=_SCHEMA) for name in self.names)
        return Entries.join(map(Entries, tables))


class LazyEntries(Sequence[Entry], ABC):
    """Entries that are not held in memory."""

    @property
    @abstractmethod
    def batches(self) -> Sequence[EntryBatch]:
        """All entries, batch by batch."""

    def __iter__(self) -> Iterator[Entry]:
        for batch in self.batches:
            yield from batch.read()

    @overload
    def __getitem__(self, index: int) -> Entry: ...
    @overload
    def __getitem__(self, index: slice) -> Entries: ...
    def __getitem__(self, index: int | slice) -> Entry | Entries:
        if isinstance(index, slice):
            return Entries.of(itertools.islice(self, *index.indices(len(self))))
        return next(itertools.islice(self, range(len(self))[index], None))


class ParquetEntries(LazyEntries):
    """Entries in Parquet files of a folder, and some held in memory."""

    def __init__(self, besides: Sequence[Entry], folder: Store, files: Sequence[FileEntry]) -> None:
        self._besides, self._folder, self._files = Entries.of(besides), folder, files
        self._count = len(besides) + sum(file.rows or 0 for file in files)

    @property
    def batches(self) -> Sequence[EntryBatch]:
        """Files grouped into batches, and last the entries held in memory."""
        most = max(_BATCH, self._count // _MOST_BATCHES)
        batches, names, rows = list[EntryBatch](), list[str](), 0
        for file in self._files:
            if names and rows + (file.rows or 0) > most:
                batches.append(EntryBatch(len(batches), None, self._folder, tuple(names)))
                names, rows = [], 0
            names.append(file.path)
            rows += file.rows or 0
        last = EntryBatch(len(batches), None, self._folder, tuple(names))
        return [*batches, last, EntryBatch(len(batches) + 1, self._besides)]

    def __len__(self) -> int:
        return self._count


class _LazyBatches(Sequence[EntryBatch]):
    """Batches that are made on demand."""

    def __init__(self, count: int, read: Callable[[int], Entries]) -> None:
        self._count, self._read = count, read

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> EntryBatch: ...
    @overload
    def __getitem__(self, index: slice) -> list[EntryBatch]: ...
    def __getitem__(self, index: int | slice) -> EntryBatch | list[EntryBatch]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        return EntryBatch(at, self._read(at))


class SpooledEntries(LazyEntries):
    """Entries in a temporary file, which is deleted with them."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self._file = tempfile.TemporaryFile(prefix="listing-")  # noqa: SIM115  # open as long as the reader
        self._count = 0
        following = iter(entries)
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.ipc.new_file(pa.PythonFile(self._file, "w"), _SCHEMA, options=options) as writer:
            while len(some := Entries.of(itertools.islice(following, _BATCH))):
                writer.write_batch(some.table.to_batches()[0])
                self._count += len(some)
        self._reader = pa.ipc.open_file(pa.PythonFile(self._file, "r"))

    @property
    def batches(self) -> Sequence[EntryBatch]:
        """Batches as they were written."""
        return _LazyBatches(self._reader.num_record_batches, self._read)

    def _read(self, number: int) -> Entries:
        return Entries(pa.Table.from_batches([self._reader.get_batch(number)]))

    def __len__(self) -> int:
        return self._count


def batches_of(entries: Sequence[Entry]) -> Sequence[EntryBatch]:
    """Return the batches of a listing."""
    if isinstance(entries, LazyEntries):
        return entries.batches
    held = Entries.of(entries)
    return _LazyBatches(-(-len(held) // _BATCH), lambda at: held[at * _BATCH : (at + 1) * _BATCH])


def collect(entries: Iterable[Entry]) -> Entries | SpooledEntries:
    """Collect entries in their order: in memory, or in a file if they are many."""
    following = iter(entries)
    first = Entries.of(itertools.islice(following, SPOOL_FROM))
    return first if len(first) < SPOOL_FROM else SpooledEntries(itertools.chain(first, following))


def values(column: pa.ChunkedArray) -> Iterator[Any]:
    """Iterate over a column's values, few of them as Python objects at once."""
    for batch in pa.table({"": column}).to_batches(max_chunksize=_CHUNK):
        yield from batch.column(0).to_pylist()


class Container(NamedTuple):
    """A file that holds many images: a tar or Parquet file."""

    path: str  # within the source
    size: int  # bytes
    version: str
    split: str | None


class ContainerTask(NamedTuple):
    """A container to list, and the folder for its images if it compresses them."""

    container: Container
    number: int
    folder: Store


@dataclass(frozen=True)
class Unpacker(ABC):
    """Lists the entries of a container; picklable."""

    uri: str  # of the folder that the containers are in
    is_labelled: bool
    class_names: tuple[str, ...] | None  # None: those found in the containers

    lays_open = False  # whether images are copied to the task's folder; else entries refer to ranges of the container

    @abstractmethod
    def __call__(self, task: ContainerTask) -> Iterator[Entry]:
        """List the entries of a container."""


@dataclass(frozen=True)
class Source:
    """A listed source; class names in the order of their ids (None: no labels).

    If its files are containers, the entries are known only once these are listed (see `open_containers`).
    """

    uri: str
    entries: Sequence[Entry]
    class_names: tuple[str, ...] | None
    read: Callable[[Entry], bytes]  # raises RejectedEntryError; any other OSError is one of storage, perhaps transient
    is_declared: bool = False  # class names are stated, whether or not each has images
    containers: tuple[Container, ...] = ()
    unpack: Unpacker | None = None
    has_names: bool = False  # entries may have a preferred name
    kind: str = ""  # folder, webdataset, parquet, index or digits
    remarks: tuple[str, ...] = ()  # what was guessed, for the user

    @property
    def num_bytes(self) -> int:
        """Sizes of all files, or of the containers."""
        sizes = (pc.sum(batch.read().column("size")).as_py() or 0 for batch in batches_of(self.entries))
        return sum(sizes) + sum(container.size for container in self.containers)

    @property
    def digest(self) -> str:
        """Hash of the listing and of class names that do not follow from it; if unchanged, nothing is read again."""
        names = self.class_names or ()
        is_text_order = names == tuple(sorted(names))  # digests from before numbers were ordered by value
        sha256 = hashlib.sha256(
            b"" if is_text_order and not self.is_declared else json.dumps(self.class_names).encode()
        )
        for entry in self.entries:
            sha256.update(json.dumps(entry[:5]).encode() + b"\n")
        for container in self.containers:
            sha256.update(json.dumps(container).encode() + b"\n")
        return sha256.hexdigest()[:32]
