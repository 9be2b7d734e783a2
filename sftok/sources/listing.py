"""What a listing of images is: entries in columns, a million of them in 150 MB, and their source.

What is longer than that is spooled to a temporary file as it is listed, and whoever works on it takes it part by part.
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
_CHUNK = 1 << 12  # entries that exist as Python objects at a time
_PART = 1 << 18  # entries that a worker is sent at a time, 30 MB
_MOST_PARTS = 1 << 14  # each bin has a segment of every part
SPOOL_FROM = 1 << 20  # entries of a listing that is kept in a file


class Entry(NamedTuple):
    """One thing that a source holds, image or not."""

    image_id: str  # path within the source, with /
    size: int  # bytes
    version: str = ""  # of the file, as far as a listing tells: modification time or etag
    class_name: str | None = None
    split: str | None = None  # None: by hash of the image id
    problem: str | None = None  # why it is rejected without being read
    file: str = ""  # where the bytes are, if not in the file that the image id names
    offset: int | None = None  # of the image in that file; None: all of the file
    name: str | None = None  # the image id that it would rather have, if no other entry has the same


class RejectedEntryError(ValueError):
    """An entry that cannot be read, now or ever; the message is the reason."""


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
        """One sequence of several."""
        return cls(pa.concat_tables([part.table for part in (cls.of(()), *parts)]).combine_chunks())

    def sorted(self) -> "Entries":
        """By image id, by code points; of equal ones those without a problem first, else as they were."""
        ids = self.table["image_id"]
        if pc.all(pc.less(ids.slice(0, max(len(ids) - 1, 0)), ids.slice(1))).as_py():
            return self  # and no copy of it
        keys = pa.table({"id": self.table["image_id"], "is_bad": pc.is_valid(self.table["problem"])})
        keys = keys.append_column("size", self.table["size"])
        return self.take(pc.sort_indices(keys, [(name, "ascending") for name in keys.column_names]))

    def take(self, indices: pa.Array) -> "Entries":
        """Some of the entries, copied."""
        return Entries(self.table.take(indices).combine_chunks())

    def column(self, name: str) -> pa.ChunkedArray:
        """All values of a field."""
        return self.table[name]

    def with_column(self, name: str, values: pa.Array | pa.ChunkedArray) -> "Entries":
        """The same with another column."""
        at = _SCHEMA.get_field_index(name)
        return Entries(self.table.set_column(at, _SCHEMA.field(at), values.cast(_SCHEMA.field(at).type)))

    def repeated(self) -> pa.ChunkedArray:
        """For sorted entries, whether each is without a problem and has the image id of the one before it."""
        ids = self.table["image_id"]
        same = pc.equal(ids.slice(1), ids.slice(0, max(len(ids) - 1, 0)))
        first = pa.array([False] * min(len(ids), 1), pa.bool_())
        return pc.and_(pa.chunked_array([first, *same.chunks], pa.bool_()), pc.is_null(self.table["problem"]))

    def without_repetitions(self) -> "Entries":
        """Sorted; of entries with one image id only the first has no problem."""
        ordered = self.sorted()
        repeated = ordered.repeated()
        if not pc.any(repeated).as_py():
            return ordered
        return ordered.with_column(
            "problem", pc.if_else(repeated, "another entry has the same name", ordered.column("problem"))
        )

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


class Part(NamedTuple):
    """Some of the entries of a listing: with the part, or in Parquet files of a folder."""

    number: int
    entries: Entries | None
    folder: Store | None = None
    names: tuple[str, ...] = ()

    def read(self) -> Entries:
        """The entries."""
        if self.entries is not None:
            return self.entries
        assert self.folder is not None
        tables = (pq.read_table(io.BytesIO(self.folder.read(name)), schema=_SCHEMA) for name in self.names)
        return Entries.join(map(Entries, tables))


class Parted(Sequence[Entry], ABC):
    """Entries that are not held in memory."""

    @property
    @abstractmethod
    def parts(self) -> Sequence[Part]:
        """All of them, a part at a time."""

    def __iter__(self) -> Iterator[Entry]:
        for part in self.parts:
            yield from part.read()

    @overload
    def __getitem__(self, index: int) -> Entry: ...
    @overload
    def __getitem__(self, index: slice) -> Entries: ...
    def __getitem__(self, index: int | slice) -> Entry | Entries:
        if isinstance(index, slice):
            return Entries.of(itertools.islice(self, *index.indices(len(self))))
        return next(itertools.islice(self, range(len(self))[index], None))


class Tables(Parted):
    """Entries in Parquet files of a folder, and some besides."""

    def __init__(self, besides: Sequence[Entry], folder: Store, files: Sequence[FileEntry]) -> None:
        self._besides, self._folder, self._files = Entries.of(besides), folder, files
        self._count = len(besides) + sum(file.rows or 0 for file in files)

    @property
    def parts(self) -> Sequence[Part]:
        """As many files together as make a part, and last what there is besides."""
        most = max(_PART, self._count // _MOST_PARTS)
        parts, names, rows = list[Part](), list[str](), 0
        for file in self._files:
            if names and rows + (file.rows or 0) > most:
                parts.append(Part(len(parts), None, self._folder, tuple(names)))
                names, rows = [], 0
            names.append(file.path)
            rows += file.rows or 0
        return [*parts, Part(len(parts), None, self._folder, tuple(names)), Part(len(parts) + 1, self._besides)]

    def __len__(self) -> int:
        return self._count


class _Parts(Sequence[Part]):
    """Parts that are made when they are asked for."""

    def __init__(self, count: int, read: Callable[[int], Entries]) -> None:
        self._count, self._read = count, read

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Part: ...
    @overload
    def __getitem__(self, index: slice) -> list[Part]: ...
    def __getitem__(self, index: int | slice) -> Part | list[Part]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        return Part(at, self._read(at))


class Spooled(Parted):
    """Entries in a temporary file, which vanishes with them."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self._file = tempfile.TemporaryFile(prefix="listing-")  # noqa: SIM115  # open as long as there is a reader
        self._count = 0
        following = iter(entries)
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.ipc.new_file(pa.PythonFile(self._file, "w"), _SCHEMA, options=options) as writer:
            while len(some := Entries.of(itertools.islice(following, _PART))):
                writer.write_batch(some.table.to_batches()[0])
                self._count += len(some)
        self._reader = pa.ipc.open_file(pa.PythonFile(self._file, "r"))

    @property
    def parts(self) -> Sequence[Part]:
        """As they were written."""
        return _Parts(self._reader.num_record_batches, self._read)

    def _read(self, number: int) -> Entries:
        return Entries(pa.Table.from_batches([self._reader.get_batch(number)]))

    def __len__(self) -> int:
        return self._count


def parts_of(entries: Sequence[Entry]) -> Sequence[Part]:
    """Entries to be worked on one part after the other."""
    if isinstance(entries, Parted):
        return entries.parts
    held = Entries.of(entries)
    return _Parts(-(-len(held) // _PART), lambda at: held[at * _PART : (at + 1) * _PART])


def collect(entries: Iterable[Entry]) -> Entries | Spooled:
    """Entries in their order: in memory or, where they are many, in a file."""
    following = iter(entries)
    first = Entries.of(itertools.islice(following, SPOOL_FROM))
    return first if len(first) < SPOOL_FROM else Spooled(itertools.chain(first, following))


def values(column: pa.ChunkedArray) -> Iterator[Any]:
    """A column's values, few of them as Python objects at a time."""
    for batch in pa.table({"": column}).to_batches(max_chunksize=_CHUNK):
        yield from batch.column(0).to_pylist()


class Container(NamedTuple):
    """A file that holds many images: a tar or Parquet file."""

    path: str  # within the source
    size: int  # bytes
    version: str
    split: str | None


class Task(NamedTuple):
    """One container to look into, and where bytes that are compressed in it can be laid open."""

    container: Container
    number: int
    folder: Store


@dataclass(frozen=True)
class Unpacker(ABC):
    """Finds the entries of a container; picklable."""

    uri: str  # of the folder that the containers are in
    is_labelled: bool
    class_names: tuple[str, ...] | None  # None: as they are found

    lays_open = False  # whether images are copied into the task's folder; else entries point into the container

    @abstractmethod
    def __call__(self, task: Task) -> Iterator[Entry]:
        """The entries of one container."""


@dataclass(frozen=True)
class Source:
    """A listed source; class names in the order of their ids (None: no labels).

    Where its files are containers, the entries are known only after looking into them (see `open_containers`).
    """

    uri: str
    entries: Sequence[Entry]
    class_names: tuple[str, ...] | None
    read: Callable[[Entry], bytes]  # raises RejectedEntryError; any other OSError is the storage's and may pass
    is_declared: bool = False  # the class names are stated somewhere, whether or not each has images
    containers: tuple[Container, ...] = ()
    unpack: Unpacker | None = None
    has_names: bool = False  # entries may have another name that they would rather have

    @property
    def digest(self) -> str:
        """Hash of what the listing tells, and of stated class names: equal means that nothing has to be read."""
        sha256 = hashlib.sha256(json.dumps(self.class_names).encode() if self.is_declared else b"")
        for entry in self.entries:
            sha256.update(json.dumps(entry[:5]).encode() + b"\n")
        for container in self.containers:
            sha256.update(json.dumps(container).encode() + b"\n")
        return sha256.hexdigest()[:32]
