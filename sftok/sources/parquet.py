"""Images in Parquet: Hugging Face's image datasets, and any table with a column of bytes and one of labels.

A single image cannot be read from Parquet, since its column is compressed in pages. Each file is therefore read once,
in small batches, and its images are copied to files of at most PIECE_BYTES, uncompressed, from which ranges are read.
"""

import json
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sftok.config import DataConfig
from sftok.sources.containers import (
    BYTES,
    check_storage,
    container_problem,
    list_containers,
    stored_range,
)
from sftok.sources.files import FolderReader, open_files
from sftok.sources.labels import class_of, no_labels, stated_names
from sftok.sources.listing import Container, ContainerTask, Entry, RejectedEntryError, Source, Unpacker
from sftok.sources.rules import class_name, distinct

SUFFIXES = (".parquet",)
PIECE_BYTES = 1 << 26
_ROWS = 64  # decoded at once
_BUFFER = 1 << 23  # bytes read at once, instead of whole columns of a row group
_LABELS = ("label", "labels", "class", "cls", "class_id", "class_name", "target")
_DAMAGE = (pa.ArrowException, OSError, ValueError)  # pyarrow raises OSError for corrupt pages too


def list_parquet(uri: str, config: DataConfig) -> Source:
    """List Parquet files of images: a folder, one file, or a pattern with braces.

    Raises:
        ValueError: the columns of images or of labels cannot be recognised.
    """
    root, containers, broken = list_containers(uri, SUFFIXES)
    schema = schema_of(root, containers)
    features = hf_features(schema)
    image = image_column(schema, features, config, root)
    label = None if config.labels == "none" else label_column(schema, features, config)
    stated = stated_names(config)
    names = stated or (None if label is None else class_label_names(features, label))
    if label is None and config.labels == "required":
        raise no_labels(root, f"columns {', '.join(schema.names)}; data.label_column names another one")
    return Source(
        uri=root,
        entries=broken,
        class_names=names if label is not None else None,
        read=FolderReader(root),
        is_declared=names is not None and label is not None,
        containers=containers,
        unpack=ParquetUnpacker(root, label is not None, names, image, label, stated is not None),
        remarks=(f"images: column {image}; labels: {f'column {label}' if label else 'none'}",),
    )


@dataclass(frozen=True)
class ParquetUnpacker(Unpacker):
    """Copies the images of a Parquet file to files of ranges; picklable."""

    image: str
    label: str | None
    is_stated: bool  # the class names come from a file, not from the schema

    lays_open = True

    def __call__(self, task: ContainerTask) -> Iterator[Entry]:
        """List an entry per row, readable or not, and one for a file that is not Parquet.

        Raises:
            ValueError: the columns or class names differ from those of the first file.
        """
        container, row = task.container, 0
        pieces = _Pieces(task)
        with open_files(self.uri).open(container.path) as file:
            try:
                parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=_BUFFER)
            except _DAMAGE as error:
                check_storage(error, self, task)
                yield container_problem(container, f"the Parquet file cannot be read: {_short(error)}")
                return
            self._check(parquet.schema_arrow, container)
            columns = [self.image, *([self.label] if self.label else [])]
            damage = "a row that its file does not hold"
            try:
                for batch in parquet.iter_batches(_ROWS, columns=columns):
                    for values in batch.to_pylist():
                        yield self._entry(values, row, container, pieces)
                        row += 1
            except _DAMAGE as error:
                check_storage(error, self, task)
                damage = f"the Parquet file is damaged: {_short(error)}"
            for lost in range(row, parquet.metadata.num_rows):
                yield Entry(f"{container.path}#{lost}", 0, split=container.split, problem=damage)
        pieces.flush()

    def _entry(self, values: dict[str, Any], row: int, container: Container, pieces: "_Pieces") -> Entry:
        held = values[self.image]
        value, name = (held.get("bytes"), held.get("path")) if isinstance(held, dict) else (held, None)
        entry = Entry(f"{container.path}#{row}", len(value or b""), split=container.split)
        if value is None:
            return entry._replace(problem="no bytes" if name is None else f"no bytes, only the path {name[:200]!r}")
        try:
            found = class_of(values[self.label], self.class_names) if self.label else None
        except RejectedEntryError as error:
            return entry._replace(problem=str(error))
        piece, offset = pieces.add(value)
        is_plain = name is not None and _is_plain(name)
        return entry._replace(class_name=found, file=piece, offset=offset, name=name if is_plain else None)

    def _check(self, schema: pa.Schema, container: Container) -> None:
        where = f"source {self.uri!r}: {container.path}"
        for column in filter(None, (self.image, self.label)):
            if column not in schema.names:
                raise ValueError(f"{where} has no column {column!r}, as the first file has: give files of one kind")
        if self.label and not self.is_stated:
            own = class_label_names(hf_features(schema), self.label)
            if own is not None and own != self.class_names:
                raise ValueError(f"{where} has other class names than the first file: give files of one dataset")


class _Pieces:
    """Concatenates images into files, each held in memory until it is full."""

    def __init__(self, task: ContainerTask) -> None:
        self.task, self.folder = task, task.folder.at(BYTES)
        self.number, self.size, self.held = 0, 0, list[bytes]()

    def add(self, data: bytes) -> tuple[str, int]:
        """Append an image and return its file and offset."""
        if self.held and self.size + len(data) > PIECE_BYTES:
            self.flush()
        at, self.size = self.size, self.size + len(data)
        self.held.append(data)
        return stored_range(self.task, self.number), at

    def flush(self) -> None:
        """Write the images held."""
        if self.held:
            self.folder.write(stored_range(self.task, self.number), b"".join(self.held))
        self.number, self.size = self.number + 1, 0
        self.held.clear()


# --- which columns


def schema_of(root: str, containers: Sequence[Container]) -> pa.Schema:
    """Read the schema of the first readable file.

    Raises:
        ValueError: there is none.
    """
    for container in containers:
        with open_files(root).open(container.path) as file:
            try:
                return pq.read_schema(file)
            except _DAMAGE as error:
                if isinstance(error, ConnectionError) or getattr(error, "errno", None) is not None:
                    raise
                trouble = f"{container.path}: {_short(error)}"
    raise ValueError(f"source {root!r}: no Parquet file can be read ({trouble if containers else 'there is none'})")


def hf_features(schema: pa.Schema) -> dict[str, Any]:
    """Read the features of the columns from Hugging Face's metadata."""
    try:
        features = dict(json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"])
    except (ValueError, KeyError, TypeError):
        return {}
    return {name: kind for name, kind in features.items() if isinstance(kind, dict)}


def class_label_names(features: dict[str, Any], label: str) -> tuple[str, ...] | None:
    """Return the names of a ClassLabel, equal ones told apart."""
    names = features.get(label, {}).get("names")
    if isinstance(names, dict):  # as YAML writes a list
        names = [names[key] for key in sorted(names, key=int)]
    return distinct([class_name(str(name)) for name in names]) if names else None


def image_candidates(schema: pa.Schema) -> list[str]:
    """List the columns that can hold images: bytes, or a struct with bytes."""
    return [field.name for field in schema if _holds_images(field.type)]


def image_column(schema: pa.Schema, features: dict[str, Any], config: DataConfig, uri: str) -> str:
    """Choose the column of images: the named one, the one declared as images, or the only one with bytes."""
    candidates = image_candidates(schema)
    if config.image_column:
        if config.image_column not in candidates:
            raise ValueError(
                f"data.image_column = {config.image_column!r} is no column of bytes of {uri!r}: choose from "
                f"{', '.join(candidates) or 'none'}"
            )
        return config.image_column
    declared = [name for name in candidates if features.get(name, {}).get("_type") == "Image"]
    for choice in (declared, candidates):
        if len(choice) == 1:
            return choice[0]
    raise ValueError(
        f"source {uri!r}: {len(candidates)} of the columns {', '.join(schema.names)} can hold images"
        f"{f' ({chr(44).join(candidates)})' if candidates else ''}: name one in data.image_column"
    )


def label_column(schema: pa.Schema, features: dict[str, Any], config: DataConfig) -> str | None:
    """Choose the column of labels: the named one, the only ClassLabel, or the one with a usual name."""
    if config.label_column:
        if config.label_column not in schema.names:
            raise ValueError(
                f"data.label_column = {config.label_column!r} is no column: choose from {', '.join(schema.names)}"
            )
        return config.label_column
    declared = [name for name in schema.names if features.get(name, {}).get("_type") == "ClassLabel"]
    if len(declared) == 1:
        return declared[0]
    return next((name for name in _LABELS if name in schema.names), None)


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" and _holds_images(kind.field(i).type) for i in range(kind.num_fields))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _is_plain(name: str) -> bool:
    """Return whether a path can be an image id: relative, and inside its root."""
    return bool(name) and not posixpath.isabs(name) and ".." not in name.split("/")


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
