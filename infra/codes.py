"""The Parquet contract between tokenizer and generator: what a code file holds, written and read in one place.

One row is one view of one image (or one sample of the generator):

    image_id   string                     path of the image within its source
    class_id   int32, null where none
    variant    string                     center, flip, affine-1 ...
    codes      fixed_size_list<uint16>[N] in the order of the latent tokens; uint32 above 65,536 codes

The schema metadata hold `CodesInfo` as JSON under the key `sftok`. Layout: zstd, and the bytes of the codes split into
streams (BYTE_STREAM_SPLIT): as small as a dictionary where codes are uniform (106 bytes for 64 codes of 13 bits),
smaller where they are not, and faster both ways.
"""

import io
import itertools
import json
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field, JsonValue, PositiveInt

from infra.config import Config
from infra.store import Store

NO_CLASS = -1
_KEY = b"sftok"
_ROWS_A_GROUP = 65_536


class CodesInfo(Config):
    """What the codes of a file mean; equal for all files of a dataset."""

    tokenizer: str = Field(description="digest of the tokenizer artifact")
    codebook_size: PositiveInt = Field(description="codes are below this")
    num_tokens: PositiveInt = Field(description="codes an image")
    image_size: PositiveInt = Field(description="side of the encoded images, in pixels")
    assignment: Literal["nearest", "sinkhorn"] = Field(description="how codes were assigned")
    precision: str = Field(description="arithmetic of the encoder: fp32, bf16 ...")
    class_names: tuple[str, ...] | None = Field(description="names by class id; null: no classes")
    sampling: dict[str, JsonValue] | None = Field(None, description="settings of the generator, on samples only")

    @property
    def dtype(self) -> np.dtype[Any]:
        """The integer type of the codes: uint16, or uint32 where 65,536 values do not suffice."""
        return np.dtype(np.uint16 if self.codebook_size <= 65_536 else np.uint32)


class CodeRows(NamedTuple):
    """Rows of code Parquet in memory."""

    image_id: list[str]
    class_id: NDArray[np.int32]  # (rows,), -1: none
    variant: list[str]
    codes: NDArray[np.integer[Any]]  # (rows, num_tokens), uint16 or uint32


def to_parquet(info: CodesInfo, rows: CodeRows) -> bytes:
    """Write rows, sorted by image id and variant; equal rows in any order give equal bytes.

    Raises:
        ValueError: for codes or classes out of range, lengths or shapes that differ, a row that comes twice.
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
        schema=_schema(info),
    )
    sink = io.BytesIO()
    pq.write_table(
        table,
        sink,
        row_group_size=_ROWS_A_GROUP,
        compression="zstd",
        use_dictionary=["class_id", "variant"],
        column_encoding={"codes.list.element": "BYTE_STREAM_SPLIT"},
        write_statistics=["image_id", "class_id", "variant"],
    )
    return sink.getvalue()


def from_parquet(source: bytes | Any, name: str = "code Parquet") -> tuple[CodesInfo, CodeRows]:
    """Read code Parquet from bytes or an open file; `name` is what errors call it.

    Raises:
        ValueError: where it is no code Parquet, or holds codes or classes that its metadata rule out.
    """
    try:
        with pq.ParquetFile(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
            table = file.read()
    except pa.ArrowInvalid as error:
        raise ValueError(f"{name} is not Parquet: {error}") from error
    metadata = table.schema.metadata or {}
    if _KEY not in metadata:
        raise ValueError(f"{name} has no metadata key {_KEY.decode()!r}: it was not written as code Parquet")
    try:
        info = CodesInfo.model_validate_json(metadata[_KEY])
    except ValueError as error:
        raise ValueError(f"{name}: metadata key {_KEY.decode()!r} is not understood: {error}") from error
    if not table.schema.equals(_schema(info)):
        raise ValueError(f"{name} has columns {table.schema.to_string(show_schema_metadata=False)!r}: not code Parquet")
    codes = table["codes"].combine_chunks()
    if isinstance(codes, pa.ChunkedArray):
        codes = pa.concat_arrays(codes.chunks) if codes.num_chunks else pa.array([], _codes_type(info))
    rows = CodeRows(
        table["image_id"].to_pylist(),
        np.array(table["class_id"].fill_null(NO_CLASS)),
        table["variant"].to_pylist(),
        np.array(codes.flatten()).reshape(-1, info.num_tokens),  # a copy, since Arrow's own memory is read-only
    )
    _check(info, rows, name)
    return info, rows


def read_codes(folder: Store, names: Sequence[str]) -> tuple[CodesInfo, CodeRows]:
    """Read several files of one dataset, in the order of their names in `names`.

    Raises:
        ValueError: naming the file, where one is damaged or is of another tokenizer or of other settings.
    """
    if not names:
        raise ValueError(f"{folder.uri}: no code files to read")
    parts: list[CodeRows] = []
    first: CodesInfo | None = None
    for name in names:
        with folder.open(name) as file:
            info, rows = from_parquet(file, f"{folder.uri}/{name}")
        first = first or info
        if info != first:
            theirs, ours = info.as_json(), first.as_json()
            field = next(field for field in ours if ours[field] != theirs[field])
            raise ValueError(
                f"{folder.uri}: {field} is {ours[field]!r} in {names[0]} and {theirs[field]!r} in {name}:"
                " code files of different datasets do not mix"
            )
        parts.append(rows)
    assert first is not None
    return first, CodeRows(
        [image_id for rows in parts for image_id in rows.image_id],
        np.concatenate([rows.class_id for rows in parts]),
        [variant for rows in parts for variant in rows.variant],
        np.concatenate([rows.codes for rows in parts]),
    )


def _check(info: CodesInfo, rows: CodeRows, name: str) -> None:
    count = len(rows.image_id)
    if (len(rows.class_id), len(rows.variant)) != (count, count) or rows.codes.shape != (count, info.num_tokens):
        raise ValueError(
            f"{name}: {count} image ids, {len(rows.class_id)} classes, {len(rows.variant)} variants and codes of shape"
            f" {rows.codes.shape} do not fit together (num_tokens = {info.num_tokens})"
        )
    if not count:
        return
    low, high = int(rows.codes.min()), int(rows.codes.max())
    if low < 0 or high >= info.codebook_size:
        raise ValueError(f"{name}: codes from {low} to {high} are not within codebook_size = {info.codebook_size}")
    classes = len(info.class_names) if info.class_names is not None else 0
    low, high = int(rows.class_id.min()), int(rows.class_id.max())
    if low < NO_CLASS or high >= classes:
        raise ValueError(f"{name}: class ids from {low} to {high} are not within {classes} class names (-1: none)")


def _codes_type(info: CodesInfo) -> pa.DataType:
    return pa.list_(pa.field("element", pa.from_numpy_dtype(info.dtype), nullable=False), info.num_tokens)


def _schema(info: CodesInfo) -> pa.Schema:
    metadata = json.dumps(info.as_json(), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    return pa.schema(
        [
            pa.field("image_id", pa.string(), nullable=False),
            pa.field("class_id", pa.int32()),
            pa.field("variant", pa.string(), nullable=False),
            pa.field("codes", _codes_type(info), nullable=False),
        ],
        metadata={_KEY: metadata},
    )
