"""The Parquet contract between tokenizer and generator: the schema of a code file, with its writer and readers.

One row is one view of one image (or one sample of the generator):

    image_id   string                     path of the image within its source
    class_id   int32, null where none
    variant    string                     center, flip, affine-1 ...
    codes      fixed_size_list<uint16>[N] in the order of the latent tokens; uint32 above 65,536 codes

The schema metadata hold `CodesInfo` as JSON under the key `sftok`. docs/reference/codes.md shows how other tools
read it, and the measurements behind the layout.
"""

import io
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field, JsonValue, PositiveInt

from infra.config import Config
from infra.store.store import Store

NO_CLASS = -1
_KEY = b"sftok"
_ROWS_PER_GROUP = 16_384  # 1.7 MB with 64 codes: one S3 request, and what a lookup of one image has to read
_LAYOUT: dict[str, Any] = {
    "compression": "zstd",
    "compression_level": 3,  # Arrow's default is lower, no faster here, and may change
    "use_dictionary": ["class_id", "variant"],
    "column_encoding": {"image_id": "DELTA_BYTE_ARRAY", "codes.list.element": "BYTE_STREAM_SPLIT"},
    "write_statistics": ["image_id", "class_id", "variant"],  # nobody filters by codes
}
_VARIANTS = pa.dictionary(pa.int32(), pa.string())
Allocate = Callable[[tuple[int, ...], np.dtype[Any]], NDArray[Any]]
"""Allocates an array of a shape and type."""


class CodesInfo(Config):
    """Meaning of a file's codes; equal for all files of a dataset."""

    tokenizer: str = Field(description="digest of the tokenizer artifact")
    codebook_size: PositiveInt = Field(description="number of codes; every code is below this")
    num_tokens: PositiveInt = Field(description="codes per image")
    image_size: PositiveInt = Field(description="side of the encoded images, in pixels")
    assignment: Literal["nearest", "sinkhorn"] = Field(description="how codes were assigned")
    precision: str = Field(description="arithmetic of the encoder: fp32, bf16 ...")
    class_names: tuple[str, ...] | None = Field(description="names by class id; null: no classes")
    sampling: dict[str, JsonValue] | None = Field(None, description="settings of the generator, on samples only")

    @property
    def dtype(self) -> np.dtype[Any]:
        """Return the integer type of the codes: uint16, or uint32 if 65,536 values do not suffice."""
        return np.dtype(np.uint16 if self.codebook_size <= 65_536 else np.uint32)


class CodeRows(NamedTuple):
    """Rows of code Parquet in memory."""

    image_id: list[str]
    class_id: NDArray[np.int32]  # (rows,), -1: none
    variant: list[str]
    codes: NDArray[np.integer[Any]]  # (rows, num_tokens), uint16 or uint32


class CodeArrays(NamedTuple):
    """Rows of code Parquet in memory, without a Python object per row."""

    codes: NDArray[np.integer[Any]]  # (rows, num_tokens), uint16 or uint32
    class_id: NDArray[np.int32]  # (rows,), -1: none
    image_id: pa.ChunkedArray | None  # (rows,) strings of Arrow; None unless asked for
    variant: pa.ChunkedArray | None  # (rows,) strings by dictionary; None unless asked for


def to_parquet(info: CodesInfo, rows: CodeRows, notes: Mapping[str, str] | None = None) -> bytes:
    """Serialize rows, sorted by image id and variant; equal rows in any order give equal bytes.

    `notes` is further metadata of this file, beside that of the dataset.

    Raises:
        ValueError: codes or classes are out of range, lengths or shapes disagree, or a row is repeated.
    """
    _check(info, rows, "rows")
    order = sorted(range(len(rows.image_id)), key=lambda row: (rows.image_id[row], rows.variant[row]))
    keys = [(rows.image_id[row], rows.variant[row]) for row in order]
    for before, after in itertools.pairwise(keys):
        if before == after:
            raise ValueError(f"rows: image_id {after[0]!r}, variant {after[1]!r} comes twice")
    index = np.array(order, dtype=np.int64)
    class_id = rows.class_id[index].astype(np.int32)
    codes = np.ascontiguousarray(rows.codes[index], dtype=info.dtype)
    table = pa.Table.from_arrays(
        [
            pa.array([image_id for image_id, _ in keys], pa.string()),
            pa.array(class_id, pa.int32(), mask=class_id == NO_CLASS),
            pa.array([variant for _, variant in keys], pa.string()),
            pa.FixedSizeListArray.from_arrays(pa.array(codes.reshape(-1)), type=_codes_type(info)),
        ],
        schema=_schema(info, notes),
    )
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=_ROWS_PER_GROUP, **_LAYOUT)
    return sink.getvalue()


def from_parquet(source: bytes | Any, name: str = "code Parquet") -> tuple[CodesInfo, CodeRows]:
    """Read code Parquet from bytes or an open file; `name` names it in errors.

    Raises:
        ValueError: it is not code Parquet, or holds codes or classes outside the ranges that its metadata state.
    """
    try:
        with pq.ParquetFile(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
            info = _info_of(file.schema_arrow, name)
            table = file.read()
    except (pa.ArrowInvalid, OSError) as error:
        raise _unreadable(error, name) from error
    codes = table["codes"].combine_chunks()
    if isinstance(codes, pa.ChunkedArray):
        codes = pa.concat_arrays(codes.chunks) if codes.num_chunks else pa.array([], _codes_type(info))
    rows = CodeRows(
        table["image_id"].to_pylist(),
        np.array(table["class_id"].fill_null(NO_CLASS)),
        table["variant"].to_pylist(),
        np.array(codes.flatten()).reshape(-1, info.num_tokens),  # a copy, since Arrow's memory is read-only
    )
    _check(info, rows, name)
    return info, rows


def read_codes(folder: Store, names: Sequence[str]) -> tuple[CodesInfo, CodeRows]:
    """Read several files of one dataset, in the order of `names`.

    Raises:
        ValueError: a file is damaged, or from another tokenizer or other settings; names the file.
    """
    parts: list[CodeRows] = []
    first: CodesInfo | None = None
    for name in _checked_names(folder, names):
        with folder.open(name) as file:
            info, rows = from_parquet(file, f"{folder.uri}/{name}")
        first = first or info
        _check_same(folder, (names[0], first), (name, info))
        parts.append(rows)
    assert first is not None
    return first, CodeRows(
        [image_id for rows in parts for image_id in rows.image_id],
        np.concatenate([rows.class_id for rows in parts]),
        [variant for rows in parts for variant in rows.variant],
        np.concatenate([rows.codes for rows in parts]),
    )


def load_info(folder: Store, name: str) -> CodesInfo:
    """Read the info of one file from its footer; ValueError if it is not code Parquet."""
    return _footers(folder, [name])[0]


def load_codes(
    folder: Store, names: Sequence[str], *, with_ids: bool = False, allocate: Allocate = np.empty
) -> tuple[CodesInfo, CodeArrays]:
    """Load a dataset for training into one preallocated array, one row group at a time.

    Peak memory is the array and one row group, so any dataset that fits into memory can be loaded.
    `torch.from_numpy(codes)` shares the array. Rows are in the order of `names`, within a file by image id and variant.

    Args:
        folder: holds the files.
        names: the files to load.
        with_ids: also load image ids and variants.
        allocate: creates the arrays of codes and of class ids, in this order.

    Raises:
        ValueError: a file is damaged, or from another tokenizer or other settings; names the file.
    """
    info, footers = _footers(folder, names)
    count = sum(footer.num_rows for footer in footers)
    codes = allocate((count, info.num_tokens), info.dtype)
    class_id = allocate((count,), np.dtype(np.int32))
    ids: list[pa.RecordBatch] = []
    at = 0
    for name, footer in zip(names, footers, strict=True):
        for batch in _batches(folder, name, footer, with_ids):
            end = at + len(batch)
            # Without nulls the values are a view of Arrow's memory, so they are copied only once, into place.
            codes[at:end] = batch["codes"].flatten().to_numpy().reshape(-1, info.num_tokens)
            class_id[at:end] = batch["class_id"].fill_null(NO_CLASS).to_numpy()
            _check_values(info, codes[at:end], class_id[at:end], f"{folder.uri}/{name}")
            if with_ids:
                ids.append(batch.select(["image_id", "variant"]))
            at = end
    if not with_ids:
        return info, CodeArrays(codes, class_id, None, None)
    schema = _schema(info)
    fields = [schema.field("image_id"), schema.field("variant").with_type(_VARIANTS)]
    table = pa.Table.from_batches(ids, pa.schema(fields))
    return info, CodeArrays(codes, class_id, table["image_id"], table["variant"].unify_dictionaries())


def _footers(folder: Store, names: Sequence[str]) -> tuple[CodesInfo, list[pq.FileMetaData]]:
    """Read the files' common info and their footers."""
    footers: list[pq.FileMetaData] = []
    first: CodesInfo | None = None
    for name in _checked_names(folder, names):
        try:
            with folder.open(name) as opened, pq.ParquetFile(opened) as file:
                info = _info_of(file.schema_arrow, f"{folder.uri}/{name}")
                footers.append(file.metadata)
        except (pa.ArrowInvalid, OSError) as error:
            raise _unreadable(error, f"{folder.uri}/{name}") from error
        first = first or info
        _check_same(folder, (names[0], first), (name, info))
    assert first is not None
    return first, footers


def _batches(folder: Store, name: str, footer: pq.FileMetaData, with_ids: bool) -> Iterator[pa.RecordBatch]:
    columns = ["class_id", "codes", *(["image_id", "variant"] if with_ids else [])]
    dictionaries = ["variant"] if with_ids else None
    try:
        with (
            folder.open(name) as opened,
            pq.ParquetFile(opened, metadata=footer, read_dictionary=dictionaries) as file,
        ):
            for group in range(footer.num_row_groups):
                yield from file.read_row_group(group, columns, use_threads=False).to_batches()
    except (pa.ArrowInvalid, OSError) as error:
        raise _unreadable(error, f"{folder.uri}/{name}") from error


def _unreadable(error: Exception, name: str) -> Exception:
    """Turn an error of Arrow's into a ValueError; a store's own errors, which have an errno, are returned unchanged."""
    if isinstance(error, ConnectionError) or getattr(error, "errno", None) is not None:
        return error
    return ValueError(f"{name} is not Parquet: {' '.join(str(error).split())}")


def _checked_names(folder: Store, names: Sequence[str]) -> Sequence[str]:
    if not names:
        raise ValueError(f"{folder.uri}: no code files to read")
    return names


def _check_same(folder: Store, first: tuple[str, CodesInfo], other: tuple[str, CodesInfo]) -> None:
    if first[1] == other[1]:
        return
    ours, theirs = first[1].as_json(), other[1].as_json()
    field = next(field for field in ours if ours[field] != theirs[field])
    raise ValueError(
        f"{folder.uri}: {field} is {ours[field]!r} in {first[0]} and {theirs[field]!r} in {other[0]}:"
        " code files of different datasets do not mix"
    )


def _info_of(schema: pa.Schema, name: str) -> CodesInfo:
    """Read the info from a file's schema, and check that its columns are the contract's."""
    metadata = schema.metadata or {}
    if _KEY not in metadata:
        raise ValueError(f"{name} has no metadata key {_KEY.decode()!r}: it was not written as code Parquet")
    try:
        info = CodesInfo.model_validate_json(metadata[_KEY])
    except ValueError as error:
        raise ValueError(f"{name}: metadata key {_KEY.decode()!r} is invalid: {error}") from error
    if not schema.equals(_schema(info)):
        raise ValueError(f"{name} has columns {schema.to_string(show_schema_metadata=False)!r}: not code Parquet")
    return info


def _check(info: CodesInfo, rows: CodeRows, name: str) -> None:
    count = len(rows.image_id)
    if (len(rows.class_id), len(rows.variant)) != (count, count) or rows.codes.shape != (count, info.num_tokens):
        raise ValueError(
            f"{name}: {count} image ids, {len(rows.class_id)} classes, {len(rows.variant)} variants and codes of shape"
            f" {rows.codes.shape} do not fit together (num_tokens = {info.num_tokens})"
        )
    _check_values(info, rows.codes, rows.class_id, name)


def _check_values(info: CodesInfo, codes: NDArray[np.integer[Any]], class_id: NDArray[np.int32], name: str) -> None:
    if not len(codes):
        return
    low, high = int(codes.min()), int(codes.max())
    if low < 0 or high >= info.codebook_size:
        raise ValueError(f"{name}: codes from {low} to {high} are not within codebook_size = {info.codebook_size}")
    classes = len(info.class_names) if info.class_names is not None else 0
    low, high = int(class_id.min()), int(class_id.max())
    if low < NO_CLASS or high >= classes:
        raise ValueError(f"{name}: class ids from {low} to {high} are not within {classes} class names (-1: none)")


def _codes_type(info: CodesInfo) -> pa.DataType:
    return pa.list_(pa.field("element", pa.from_numpy_dtype(info.dtype), nullable=False), info.num_tokens)


def _schema(info: CodesInfo, notes: Mapping[str, str] | None = None) -> pa.Schema:
    metadata = json.dumps(info.as_json(), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    return pa.schema(
        [
            pa.field("image_id", pa.string(), nullable=False),
            pa.field("class_id", pa.int32()),
            pa.field("variant", pa.string(), nullable=False),
            pa.field("codes", _codes_type(info), nullable=False),
        ],
        metadata={**{key.encode(): note.encode() for key, note in (notes or {}).items()}, _KEY: metadata},
    )
