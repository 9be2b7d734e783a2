"""An index of images: a CSV or Parquet table of paths and labels, and optionally splits.

Paths are relative to the index, absolute, or URIs (s3://...); the image id is the path as the index writes it. A file
is also found without blanks around its path, and under the other form of Unicode.
"""

import csv
import logging
import posixpath
import re
import unicodedata
from collections.abc import Iterator
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pc_csv
import pyarrow.parquet as pq

from infra.store.location import SCHEME, parse_location
from infra.store.types import FileInfo
from sftok.config import DataConfig
from sftok.sources.class_ids import class_name, unicode_remarks
from sftok.sources.columns import (
    LABELS,
    PATHS,
    as_text,
    check_label_type,
    choose,
    image_of_text,
    labels_of,
    plain,
    remark,
)
from sftok.sources.files import FOLDER_AS_IMAGE, FolderReader, beside, is_of_storage, locate, open_files
from sftok.sources.labels import are_numbers, class_of, names_of, no_labels, nothing_labelled, stated_names
from sftok.sources.listing import REPEATED, Entries, Entry, RejectedEntryError, Source, collect
from sftok.sources.rules import SPLIT_NAMES, check_one_name_each, listed, shown, split_word, splits_by_word

log = logging.getLogger(__name__)

_DELIMITERS = (",", ";", "\t", "|")
_BLOCK = 1 << 25  # bytes of a CSV read at once, the most that a row may have
_LONGEST_HEADER = 1 << 16  # bytes
_CACHED_FOLDERS = 8
_LONGEST_PART, _LONGEST_KEY = 255, 1024  # bytes of a name in file systems, and of a whole path on S3
_DOTS = re.compile(r"(^|/)\.{1,2}/|//")  # the same file has other paths
_TOLD = b"columns"  # metadata of the table: what was read as what


def list_index(uri: str, config: DataConfig) -> Source:
    """List the images that an index names.

    Raises:
        ValueError: the index cannot be read, or lacks a column.
    """
    table = _table(uri, config)
    reader = FolderReader(beside(uri)[0].uri)
    stated = stated_names(config)
    splits = _splits(uri, table)
    written: set[str] = set()

    def all_entries() -> Iterator[Entry]:
        for entry in _entries(reader.root, table, splits, stated):
            if entry.class_name is not None:
                written.add(entry.class_name)
                entry = entry._replace(class_name=class_name(entry.class_name))
            yield entry

    entries = collect(all_entries())
    if isinstance(entries, Entries):
        entries = entries.without_repetitions()  # of a longer listing, the plan marks them
    if not len(entries):
        raise ValueError(f"source {uri!r} names no images: add rows")
    names = stated
    if names is None and config.labels != "none":
        names = names_of(written, uri)
        if names is None and config.labels == "required":
            raise nothing_labelled(uri, entries)
    is_declared = stated is not None or are_numbers(names)
    remarks = (table.schema.metadata[_TOLD].decode(), *unicode_remarks(written))
    return Source(uri, entries, names, reader, is_declared=is_declared, remarks=remarks)


def check_index(uri: str, config: DataConfig) -> None:
    """Check an index without looking at the images that it names.

    Raises:
        ValueError: as `list_index`, for errors of the index itself.
    """
    stated_names(config)
    table = _table(uri, config)
    if not len(table):
        raise ValueError(f"source {uri!r} names no images: add rows")
    _splits(uri, table)


def is_index(schema: pa.Schema, config: DataConfig, uri: str) -> bool:
    """Return whether a Parquet file has the columns of an index."""
    return choose(schema.names, PATHS, config.image_column, "data.image_column", uri) is not None


def _table(uri: str, config: DataConfig) -> pa.Table:
    """Read the index at `uri`: columns path, label (null without labels) and split (null where there is none)."""
    files, name = beside(uri)
    try:
        file = files.open(name)
    except FileNotFoundError as error:
        problem = "is a folder: give the index itself" if open_files(uri).exists() else "does not exist"
        raise ValueError(f"source {uri!r} {problem}") from error
    with file:
        try:
            is_parquet = uri.lower().endswith(".parquet")
            table = pq.ParquetFile(file).read() if is_parquet else _read_csv(file, uri, config)
        except (pa.ArrowException, OSError) as error:
            if is_of_storage(error):
                raise
            reason = " ".join(str(error).split())[:150]
            remedy = "save it as UTF-8 text" if "UTF8" in reason else "give a table of one row per image"
            raise ValueError(f"source {uri!r} cannot be read as an index: {reason}; {remedy}") from error
    names = table.column_names
    path = choose(names, PATHS, config.image_column, "data.image_column", uri)
    if path is None:
        raise ValueError(f"source {uri!r} has the columns {listed(names)}: name that of paths in data.image_column")
    label = None if config.labels == "none" else choose(names, LABELS, config.label_column, "data.label_column", uri)
    if label is None and config.labels == "required":
        raise no_labels(uri, f"columns {listed(names)}; data.label_column names another one")
    if label is not None:
        check_label_type(table.field(label), uri)
    split = choose(names, ("split",), "", "", uri)
    nulls = pa.nulls(len(table), pa.string())
    columns = {
        "path": as_text(table[path], table.field(path), uri, "data.image_column"),
        "label": nulls if label is None else labels_of(table[label]),
        "split": nulls if split is None else as_text(table[split], table.field(split), uri, ""),
    }
    _check_paths(columns["path"], path, uri)
    told = [
        remark("paths", path, names, PATHS, "data.image_column"),
        remark("labels", label, names, LABELS, "data.label_column"),
    ]
    return pa.table(columns).replace_schema_metadata({_TOLD: "; ".join(told)})


def _check_paths(paths: pa.ChunkedArray, column: str, uri: str) -> None:
    """Refuse images in place of paths."""
    first = paths.drop_null()[:1].to_pylist()
    if first and image_of_text(first[0]) is not None:
        raise ValueError(
            f"source {uri!r}: column {shown(column, 40)} holds images as base64 text, not paths: save the table as "
            "Parquet, where they are read"
        )


def _read_csv(file: BinaryIO, uri: str, config: DataConfig) -> pa.Table:
    """Read all columns as text: "007" is a name, not the number 7. The delimiter is the one that shows the paths."""
    start = file.readline(_LONGEST_HEADER)
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise pa.ArrowInvalid("it is UTF-16, not UTF8")
    file.seek(0)
    header = re.split("[\r\n]", start.decode("utf-8-sig", "replace"))[:1]
    wanted = {plain(config.image_column)} if config.image_column else set(PATHS)
    usual = ("\t", *_DELIMITERS) if uri.lower().endswith(".tsv") else _DELIMITERS
    fitting = (one for one in usual if not wanted.isdisjoint(map(plain, next(csv.reader(header, delimiter=one), ()))))
    parse = pc_csv.ParseOptions(delimiter=next(fitting, usual[0]), newlines_in_values=True)
    read = pc_csv.ReadOptions(block_size=_BLOCK)
    with pc_csv.open_csv(file, read_options=read, parse_options=parse) as reader:
        names = reader.schema.names
    file.seek(0)
    convert = pc_csv.ConvertOptions(
        column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=True, null_values=[""]
    )
    return pc_csv.read_csv(file, read_options=read, parse_options=parse, convert_options=convert)


def _splits(uri: str, table: pa.Table) -> dict[str | None, str | None]:
    """Map the words in the column of splits to splits; rows with a word that is not in the map are not read.

    Rows without a word are always read, and split by hash.

    Raises:
        ValueError: a word is unknown, there is a val split only, or one split has two words.
    """
    cells = pc.unique(table["split"]).to_pylist()
    words = {cell: None if cell is None else split_word(cell) for cell in cells}
    if unknown := [cell for cell, word in words.items() if cell is not None and word is None]:
        raise ValueError(
            f"source {uri!r}: split {shown(unknown[0])} is none of {', '.join(SPLIT_NAMES)}: correct the index"
        )
    splits = splits_by_word(words.values(), uri, "rows")
    check_one_name_each({word: word for word in words.values() if word is not None}, uri, "rows")
    if unread := sorted(word for word in words.values() if word is not None and word not in splits):
        log.warning("source %s: %s rows are not read", uri, ", ".join(unread))
    return {cell: splits.get(word) for cell, word in words.items() if word in splits or cell is None}


def _entries(
    root: str, table: pa.Table, splits: dict[str | None, str | None], names: tuple[str, ...] | None
) -> Iterator[Entry]:
    """Yield an entry per row, in the order of paths, so that each folder is listed once."""
    order = pc.sort_indices(table["path"])
    ordered = table.take(order).append_column("row", order)
    folders = _Folders(root)
    dotted = table["path"].filter(pc.match_substring_regex(table["path"], _DOTS.pattern))
    several, told = set(map(posixpath.normpath, dotted.to_pylist())), set[str]()  # paths of one file
    for batch in ordered.to_batches(max_chunksize=1 << 14):
        for path, label, split, row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            if split not in splits:
                continue
            if path is None or path == "":
                yield Entry(f"row {row}", 0, problem="the index has no path here")
                continue
            try:
                place, item = folders.find(path)
            except RejectedEntryError as error:
                yield Entry(f"row {row}: {shown(path.rpartition('@')[2])}", 0, problem=str(error))
                continue
            problem = item.problem
            if problem is None and (same := posixpath.normpath(path)) in several:
                problem = REPEATED if same in told else None
                told.add(same)
            try:
                found = class_of(label, names)
            except RejectedEntryError as error:
                found, problem = None, problem or str(error)
            is_elsewhere = place != path or path.startswith("/") or "://" in path
            yield Entry(path, item.size, item.version, found, splits[split], problem, place if is_elsewhere else "")


class _Folders:
    """Finds files by listing their folders; the last few listings are cached."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.listed: dict[str, dict[str, FileInfo]] = {}

    def find(self, path: str) -> tuple[str, FileInfo]:
        """Return where a path leads and what is listed there, which has a problem if the file does not exist.

        Raises:
            RejectedEntryError: no file can have the path.
        """
        for place in self._places(path):
            folder, slash, name = place.rpartition("/")
            if folder not in self.listed:
                if len(self.listed) == _CACHED_FOLDERS:
                    del self.listed[next(iter(self.listed))]
                self.listed[folder] = self._list(folder + slash)
            if (item := self.listed[folder].get(name)) is not None:
                return place, FileInfo(path, problem=FOLDER_AS_IMAGE) if item.is_folder else item
        return path, FileInfo(path, problem="there is no such file")

    def _places(self, path: str) -> Iterator[str]:
        """Yield where a path leads as it is written, and then without blanks around it and in the forms of Unicode."""
        yield _place(self.root, path)
        bare = path.strip()
        others = (bare, *(unicodedata.normalize(form, bare) for form in ("NFC", "NFD")))
        yield from (_place(self.root, other) for other in dict.fromkeys(others) if other != path)

    def _list(self, folder: str) -> dict[str, FileInfo]:
        files, inner = locate(self.root, folder)
        try:
            return {item.name: item for item in files.scan(inner)}
        except (FileNotFoundError, NotADirectoryError):
            return {}


def _place(root: str, path: str) -> str:
    """Return where a path leads: relative to `root`, absolute, or on S3, whose keys mean '.' and '..' literally.

    Raises:
        RejectedEntryError: it leads out of its bucket, or no file can have it.
    """
    if "\0" in path:
        raise RejectedEntryError("its path holds a NUL character")
    if len(path) > _LONGEST_PART and image_of_text(path) is not None:
        raise RejectedEntryError("its path is an image in base64: of text, images are read in Parquet only")
    if SCHEME.match(path):
        try:
            path = parse_location(path, "its path", "a path or s3:// URI").uri
        except ValueError as error:
            raise RejectedEntryError(str(error)) from error
    full = path if path.startswith(("/", "s3://")) else f"{root}/{path}"
    if not full.startswith("s3://"):
        longest = max(len(part.encode()) for part in path.split("/")) if 4 * len(path) > _LONGEST_PART else 0
        if longest > _LONGEST_PART:
            raise RejectedEntryError(f"a part of its path has {longest} bytes, more than {_LONGEST_PART}")
        return path
    bucket, _, key = full.removeprefix("s3://").partition("/")
    key = posixpath.normpath(key)
    if key.split("/")[0] == "..":
        raise RejectedEntryError("its path leads out of the bucket")
    if len(key.encode()) > _LONGEST_KEY:
        raise RejectedEntryError(f"its path has {len(key.encode())} bytes, more than {_LONGEST_KEY}")
    return f"s3://{bucket}/{key}".removeprefix(f"{root}/")
