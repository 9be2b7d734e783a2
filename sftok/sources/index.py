"""An index of images: a CSV or Parquet table of paths and labels, and optionally splits.

Paths are relative to the index, absolute, or URIs (s3://...); the image id is the path as the index writes it.
"""

import logging
import os
from collections.abc import Iterator
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pc_csv
import pyarrow.parquet as pq

from infra.store.types import FileInfo
from sftok.config import DataConfig
from sftok.sources.files import FOLDER_AS_IMAGE, FolderReader, beside, locate
from sftok.sources.labels import are_numbers, class_of, names_of, no_labels, stated_names
from sftok.sources.listing import Entries, Entry, RejectedEntryError, Source, collect
from sftok.sources.rules import SPLIT_NAMES, split_word, splits_by_word

log = logging.getLogger(__name__)

SUFFIXES = (".csv", ".tsv", ".parquet")
PATHS = ("path", "file_name", "filename", "filepath", "file", "image", "image_path")
_LABELS = ("label", "labels", "class", "class_id", "class_name", "target")
_CACHED_FOLDERS = 8
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
    classes: set[str] = set()

    def all_entries() -> Iterator[Entry]:
        for entry in _entries(reader.root, table, splits, stated):
            if entry.class_name is not None:
                classes.add(entry.class_name)
            yield entry

    entries = collect(all_entries())
    if isinstance(entries, Entries):
        entries = entries.without_repetitions()  # of a longer listing, the plan marks them
    if not len(entries):
        raise ValueError(f"source {uri!r} names no images: add rows")
    names = stated
    if names is None and config.labels != "none":
        names = names_of(classes, uri)
        if names is None and config.labels == "required":
            raise no_labels(uri, f"columns {', '.join(table.column_names)}; data.label_column names another one")
    is_declared = stated is not None or are_numbers(names)
    remarks = (table.schema.metadata[_TOLD].decode(),)
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


def is_index(schema: pa.Schema, config: DataConfig) -> bool:
    """Return whether a Parquet file has the columns of an index."""
    return _choose(schema.names, config.image_column, PATHS) is not None


def _table(uri: str, config: DataConfig) -> pa.Table:
    """Open and read the index at `uri`; see `_read`."""
    files, name = beside(uri)
    try:
        file = files.open(name)
    except FileNotFoundError as error:
        is_folder = os.path.isdir(os.path.join(files.uri, name))
        problem = "is a folder: give the index itself" if is_folder else "does not exist"
        raise ValueError(f"source {uri!r} {problem}") from error
    return _read(uri, file, config)


def _read(uri: str, file: BinaryIO, config: DataConfig) -> pa.Table:
    """Read an index: columns path, label (null without labels) and split (null where there is none), as text."""
    with file:
        try:
            table = pq.read_table(file) if uri.lower().endswith(".parquet") else _read_csv(file, uri)
        except (pa.ArrowException, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"source {uri!r} cannot be read as an index: {reason}") from error
    names = table.column_names
    path = _choose(names, config.image_column, PATHS)
    if path is None:
        raise ValueError(f"source {uri!r} has the columns {', '.join(names)}: name that of paths in data.image_column")
    label = None if config.labels == "none" else _choose(names, config.label_column, _LABELS)
    nulls = pa.nulls(len(table), pa.string())
    columns = {
        "path": table[path].cast(pa.string()),
        "label": nulls if label is None else table[label],
        "split": table["split"].cast(pa.string()) if "split" in names else nulls,
    }
    told = f"paths: column {path}; labels: {f'column {label}' if label else 'none'}"
    return pa.table(columns).replace_schema_metadata({_TOLD: told})


def _read_csv(file: BinaryIO, uri: str) -> pa.Table:
    """Read all columns as text: "007" is a name, not the number 7."""
    delimiter = "\t" if uri.lower().endswith(".tsv") else ","
    parse = pc_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    with pc_csv.open_csv(file, parse_options=parse) as reader:
        names = reader.schema.names
    file.seek(0)
    convert = pc_csv.ConvertOptions(
        column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=True, null_values=[""]
    )
    return pc_csv.read_csv(file, parse_options=parse, convert_options=convert)


def _choose(names: list[str], wanted: str, usual: tuple[str, ...]) -> str | None:
    if wanted:
        return wanted if wanted in names else None
    return next((name for name in usual if name in names), None)


def _splits(uri: str, table: pa.Table) -> dict[str | None, str | None]:
    """Map the words in the column of splits to splits; rows with a word that is not in the map are not read.

    Raises:
        ValueError: a word is unknown, or there is a val split only.
    """
    cells = pc.unique(table["split"]).to_pylist()
    words = {cell: None if cell is None else split_word(cell) for cell in cells}
    if unknown := [cell for cell, word in words.items() if cell is not None and word is None]:
        raise ValueError(f"source {uri!r}: split {unknown[0]!r} is none of {', '.join(SPLIT_NAMES)}: correct the index")
    splits = splits_by_word(words.values(), uri, "rows")
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
    for batch in ordered.to_batches(max_chunksize=1 << 14):
        for path, label, split, row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            if split not in splits:
                continue
            if path is None or path == "":
                yield Entry(f"row {row}", 0, problem="the index has no path here")
                continue
            item, problem = folders.find(path), None
            try:
                class_name = class_of(label, names)
            except RejectedEntryError as error:
                class_name, problem = None, str(error)
            is_elsewhere = path.startswith("/") or "://" in path
            yield Entry(
                path,
                item.size,
                item.version,
                class_name,
                splits[split],
                item.problem or problem,
                file=path if is_elsewhere else "",
            )


class _Folders:
    """Finds files by listing their folders; the last few listings are cached."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.listed: dict[str, dict[str, FileInfo]] = {}

    def find(self, path: str) -> FileInfo:
        """Return what is listed of a file; it has a problem if the file does not exist."""
        folder, slash, name = path.rpartition("/")
        if folder not in self.listed:
            if len(self.listed) == _CACHED_FOLDERS:
                del self.listed[next(iter(self.listed))]
            self.listed[folder] = self._list(folder + slash)
        item = self.listed[folder].get(name)
        if item is None or item.is_folder:
            return FileInfo(path, problem="there is no such file" if item is None else FOLDER_AS_IMAGE)
        return item

    def _list(self, folder: str) -> dict[str, FileInfo]:
        files, inner = locate(self.root, folder)
        try:
            return {item.name: item for item in files.scan(inner)}
        except (FileNotFoundError, NotADirectoryError):
            return {}
