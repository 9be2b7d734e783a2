"""Choose the columns of a table that hold images or paths, labels and splits: by name, type and contents.

A choice between two columns is never made silently: names that differ in case or blanks only are refused, and what is
preferred to another usual name is told.
"""

import base64
import binascii
import json
import re
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from sftok.config import DataConfig
from sftok.sources.class_ids import class_name, distinct
from sftok.sources.rules import listed, shown

PATHS = ("path", "file_name", "filename", "filepath", "file", "image", "image_path")
LABELS = ("label", "labels", "class", "cls", "class_id", "class_name", "target")
_LONGEST_DIGEST = 64  # bytes of a fixed size that are a hash or an id
_BASE64 = re.compile(r"(?:data:image/[\w.+-]+;base64,)?([A-Za-z0-9+/_-]{40,})={0,2}", re.ASCII)
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP", b"\xff\x4f\xff")


# --- by name


def choose(names: Sequence[str], usual: Sequence[str], stated: str, option: str, uri: str) -> str | None:
    """Choose a column: the stated one, or the first of the usual names in any case; None if there is none.

    Args:
        names: of all columns.
        usual: in lower case.
        stated: value of the option; empty: the usual names.
        option: such as data.label_column, for messages.
        uri: of the source, for messages.

    Raises:
        ValueError: the stated one is not there, or two columns have the name.
    """
    if stated and names.count(stated) == 1:
        return stated
    wanted = (plain(stated),) if stated else usual
    for name in wanted:
        same = [column for column in names if plain(column) == name]
        if len(same) > 1:
            are_distinct = option and len(set(same)) == len(same)
            remedy = f"name one in {option}" if are_distinct else "rename or remove all but one"
            raise ValueError(f"source {uri!r} has {len(same)} columns {name!r} ({listed(map(repr, same))}): {remedy}")
        if same:
            return same[0]
    if stated:
        raise ValueError(f"{option} = {stated!r} is no column of {uri!r}: choose from {listed(names)}")
    return None


def remark(what: str, chosen: str | None, names: Sequence[str], usual: Sequence[str], option: str) -> str:
    """Tell which column was chosen, and which others have a usual name."""
    others = [name for name in names if name != chosen and plain(name) in usual]
    return f"{what}: {f'column {chosen}' if chosen else 'none'}" + (
        f", not {listed(others)}, which {option} can name" if chosen and others else ""
    )


def plain(name: str) -> str:
    """Normalise a column's name: in lower case, without blanks around it."""
    return name.strip().strip("\ufeff").lower()


# --- by type


def check_label_type(field: pa.Field, uri: str) -> None:
    """Check that a column can hold labels: numbers, names or booleans.

    Raises:
        ValueError: it holds lists, structs, times or the like.
    """
    kind, types = _decoded(field.type), pa.types
    tests = (types.is_integer, types.is_floating, types.is_decimal, types.is_boolean, types.is_null)
    if not (is_text(kind) or _is_bytes(kind) or any(test(kind) for test in tests)):
        raise _odd(uri, field, "a label is one number or name", "data.label_column, or set data.labels = none")


def as_text(column: pa.ChunkedArray, field: pa.Field, uri: str, option: str) -> pa.ChunkedArray:
    """Convert a column of paths or splits to text.

    Raises:
        ValueError: it holds something else.
    """
    kind = _decoded(field.type)
    if not (is_text(kind) or _is_bytes(kind) or pa.types.is_null(kind)):
        raise _odd(uri, field, "one image as bytes, or one path as text, is read per row", option)
    try:
        return column.cast(kind).cast(pa.string())
    except pa.ArrowException as error:
        raise _odd(uri, field, "its bytes are not UTF-8", option) from error


def labels_of(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Decode a dictionary, and texts to their plain type."""
    kind = _decoded(column.type)
    return column.cast(kind).cast(pa.string()) if is_text(kind) else column.cast(kind)


def image_candidates(schema: pa.Schema, stated: str) -> list[str]:
    """List the columns of bytes, which can hold images; those called like labels only if stated."""
    kept = (field for field in schema if field.name == stated or plain(field.name) not in LABELS)
    return [field.name for field in kept if holds_images(field.type)]


def holds_images(kind: pa.DataType) -> bool:
    """Return whether a type can hold images: bytes, or a struct with bytes."""
    if pa.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" and holds_images(kind.field(i).type) for i in range(kind.num_fields))
    return _is_bytes(_decoded(kind))


def is_text(kind: pa.DataType) -> bool:
    """Return whether a type holds text, also as a dictionary."""
    kind = _decoded(kind)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _odd(uri: str, field: pa.Field, why: str, option: str) -> ValueError:
    kind = str(field.type)
    kind = kind if len(kind) <= 60 else f"{kind[:57]}..."
    return ValueError(
        f"source {uri!r}: column {shown(field.name, 40)} is of type {kind}, and {why}: convert it, or "
        + (f"name another column in {option}" if option else "rename it")
    )


def _decoded(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_fixed_size_binary(kind):
        return int(kind.byte_width) > _LONGEST_DIGEST
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


# --- by contents


def image_of_text(text: str) -> bytes | None:
    """Decode an image from base64, in any of its alphabets and also as a data: URI; None if it is none."""
    match = _BASE64.fullmatch("".join(text.split()))
    if match is None:
        return None
    try:
        data = base64.b64decode(match[1].translate({45: 43, 95: 47}) + "=" * (-len(match[1]) % 4))
    except binascii.Error:
        return None
    return data if data.startswith(_MAGIC) or data[4:8] == b"ftyp" else None


# --- of images


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


def image_column(
    schema: pa.Schema, candidates: Sequence[str], features: dict[str, Any], config: DataConfig, uri: str
) -> str:
    """Choose the column of images: the named one, the one declared as images, or the only one that can hold them."""
    stated = choose(schema.names, (), config.image_column, "data.image_column", uri)
    if stated is not None:
        if stated not in candidates:
            others = f", or name {listed(candidates)}" if candidates else ""
            raise _odd(uri, schema.field(stated), f"images are bytes{others}", "data.image_column")
        return stated
    declared = [name for name in candidates if features.get(name, {}).get("_type") == "Image"]
    for choice in (declared, candidates):
        if len(choice) == 1:
            return choose(schema.names, (), choice[0], "data.image_column", uri) or choice[0]
    if not candidates:
        types = listed(f"{field.name} ({field.type})" for field in schema)
        raise ValueError(
            f"source {uri!r}: no column holds images as bytes ({types}): store the bytes of one file per row, or name "
            "the one file that is an index of paths"
        )
    raise ValueError(
        f"source {uri!r}: {len(candidates)} of the columns {listed(schema.names)} can hold images "
        f"({listed(candidates)}): name one in data.image_column"
    )


def label_column(schema: pa.Schema, features: dict[str, Any], config: DataConfig, uri: str) -> str | None:
    """Choose the column of labels: the named one, the only ClassLabel, or the one with a usual name."""
    declared = [name for name in schema.names if features.get(name, {}).get("_type") == "ClassLabel"]
    stated = config.label_column or (declared[0] if len(declared) == 1 else "")
    label = choose(schema.names, LABELS, stated, "data.label_column", uri)
    if label is not None:
        check_label_type(schema.field(label), uri)
    return label
