"""Images in Parquet: Hugging Face's image datasets, and any table with a column of bytes and one of labels.

A single image cannot be read from Parquet, since its column is compressed in pages. Each file is therefore read once,
in small batches, and its images are copied to files of at most PIECE_BYTES, uncompressed, from which ranges are read.
"""

import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sftok.config import DataConfig
from sftok.sources.columns import (
    LABELS,
    class_label_names,
    hf_features,
    holds_images,
    image_candidates,
    image_column,
    image_of_text,
    is_text,
    label_column,
    remark,
)
from sftok.sources.containers import Pieces, check_storage, container_problem, list_containers
from sftok.sources.files import FolderReader, is_of_storage, open_files
from sftok.sources.labels import class_of, no_labels, stated_names
from sftok.sources.listing import Container, ContainerTask, Entry, RejectedEntryError, Source, Unpacker
from sftok.sources.rules import listed, shown

SUFFIXES = (".parquet",)
_ROWS = 64  # decoded at once
_BUFFER = 1 << 23  # bytes read at once, instead of whole columns of a row group
_LONGEST_NAME = 1000  # characters of a path that serves as an image id
_DAMAGE = (pa.ArrowException, OSError, ValueError)  # pyarrow raises OSError for corrupt pages too


def list_parquet(uri: str, config: DataConfig) -> Source:
    """List Parquet files of images: a folder, one file, or a pattern.

    Raises:
        ValueError: the columns of images or of labels cannot be recognised.
    """
    root, containers, broken = list_containers(uri, SUFFIXES)
    schema, candidates = look_into(root, containers, config.image_column)
    features = hf_features(schema)
    image = image_column(schema, candidates, features, config, root)
    label = None if config.labels == "none" else label_column(schema, features, config, root)
    stated = stated_names(config)
    names = stated or (None if label is None else class_label_names(features, label))
    if label is None and config.labels == "required":
        raise no_labels(root, f"columns {listed(schema.names)}; data.label_column names another one")
    return Source(
        uri=root,
        entries=broken,
        class_names=names if label is not None else None,
        read=FolderReader(root),
        is_declared=names is not None and label is not None,
        containers=containers,
        unpack=ParquetUnpacker(root, label is not None, names, image, label, stated is not None),
        has_names=True,
        remarks=(f"images: column {image}; {remark('labels', label, schema.names, LABELS, 'data.label_column')}",),
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
        pieces = Pieces(task)
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

    def _entry(self, values: dict[str, Any], row: int, container: Container, pieces: Pieces) -> Entry:
        held = values[self.image]
        value, name = (held.get("bytes"), held.get("path")) if isinstance(held, dict) else (held, None)
        entry = Entry(f"{container.path}#{row}", len(value or b""), split=container.split)
        if isinstance(value, str):
            value = image_of_text(value)
            if value is None:
                return entry._replace(problem="its text is no image in base64")
            entry = entry._replace(size=len(value))
        if value is None:
            return entry._replace(problem="no bytes" if name is None else f"no bytes, only the path {shown(name)}")
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
        kind = schema.field(self.image).type
        if not holds_images(kind) and not is_text(kind):
            raise ValueError(f"{where} has no images in column {self.image!r}: give files of one kind")
        if self.label and not self.is_stated:
            own = class_label_names(hf_features(schema), self.label)
            if own is not None and own != self.class_names:
                raise ValueError(f"{where} has other class names than the first file: give files of one dataset")


# --- which columns


def look_into(root: str, containers: Sequence[Container], stated: str) -> tuple[pa.Schema, list[str]]:
    """Read the schema of the first readable file, and list the columns that can hold images.

    Those are the columns of bytes; if there are none, or another column is stated, also those of text whose first
    value is an image in base64.

    Raises:
        ValueError: no file can be read.
    """
    for container in containers:
        with open_files(root).open(container.path) as file:
            try:
                parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=_BUFFER)
                schema = parquet.schema_arrow
                found = image_candidates(schema, stated)
                if not found or (stated and stated not in found):
                    found += _images_in_text(parquet)
                return schema, found
            except _DAMAGE as error:
                if is_of_storage(error):
                    raise
                trouble = f"{container.path}: {_short(error)}"
    raise ValueError(f"source {root!r}: no Parquet file can be read ({trouble if containers else 'there is none'})")


def _images_in_text(parquet: pq.ParquetFile) -> list[str]:
    columns = [field.name for field in parquet.schema_arrow if is_text(field.type)]
    for batch in parquet.iter_batches(_ROWS, columns=columns) if columns else ():
        firsts = {field.name: batch.column(at).drop_null()[:1].to_pylist() for at, field in enumerate(batch.schema)}
        return [name for name, values in firsts.items() if values and image_of_text(values[0]) is not None]
    return []


def _is_plain(name: str) -> bool:
    """Return whether a path can be an image id: relative, and inside its root."""
    is_short = 0 < len(name) <= _LONGEST_NAME and "\0" not in name
    return is_short and not posixpath.isabs(name) and ".." not in name.split("/")


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
