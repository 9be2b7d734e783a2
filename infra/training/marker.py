"""checkpoint.json, the marker of a complete checkpoint: its tensors, and which file holds which part of each."""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, NonNegativeInt, TypeAdapter, ValidationError, model_validator

from infra.config import Config
from infra.store.store import Store

MARKER = "checkpoint.json"
DAMAGE = (FileNotFoundError, ValueError)
"""Errors of a checkpoint that is not whole."""
LARGEST_HEADER = 100_000_000  # bytes; of a safetensors file, as its own library limits it

_JSON = TypeAdapter[JsonValue](JsonValue)

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Place = tuple[NonNegativeInt, ...]
Dtype = Literal["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"]  # as safetensors names them


class Chunk(Config):
    """A box of a tensor's elements, stored in one file."""

    offsets: Place
    sizes: Place
    file: str

    @property
    def ends(self) -> list[int]:
        """Return the offsets at which it ends, excluded."""
        return [offset + size for offset, size in zip(self.offsets, self.sizes, strict=True)]


class StoredTensor(Config):
    """A tensor, whole or in chunks; chunks without elements are left out."""

    dtype: Dtype
    shape: Place
    chunks: tuple[Chunk, ...]

    @model_validator(mode="after")
    def _is_covered(self) -> Self:
        for chunk in self.chunks:
            if len(chunk.offsets) != len(self.shape) or len(chunk.sizes) != len(self.shape):
                raise ValueError(f"a chunk has another number of dimensions than the shape {list(self.shape)}")
            if any(end > size for end, size in zip(chunk.ends, self.shape, strict=True)):
                raise ValueError(f"a chunk of {list(chunk.sizes)} at {list(chunk.offsets)} exceeds {list(self.shape)}")
        if sum(math.prod(chunk.sizes) for chunk in self.chunks) != math.prod(self.shape) or _overlap(self.chunks):
            raise ValueError(f"chunks do not cover the shape {list(self.shape)} once")
        return self


class Marker(Config):
    """The marker, whose existence means that the checkpoint is complete."""

    step: int
    files: dict[str, Sha256]
    tensors: dict[str, StoredTensor]
    state: dict[str, JsonValue]

    @model_validator(mode="after")
    def _files_are_named_by_content(self) -> Self:
        for name, sha256 in self.files.items():
            if name != file_name(sha256):
                raise ValueError(f"file {name[:80]!r} is not {file_name(sha256)}, as its SHA-256 demands")
        for name, tensor in self.tensors.items():
            if any(chunk.file not in self.files for chunk in tensor.chunks):
                raise ValueError(f"a chunk of {name[:80]!r} is in a file that is not listed")
        return self


class WholeMarker(Config):
    """The marker of a checkpoint of one file with whole tensors, as older versions wrote it."""

    step: int
    file: str
    sha256: Sha256
    state: dict[str, JsonValue]


def file_name(sha256: str) -> str:
    """Name a file by its content: a second writer of a step cannot change what the first one's marker covers."""
    return f"{sha256[:16]}.safetensors"


def tensor_key(name: str, chunk: Chunk, shape: Place) -> str:
    """Return the key, in its file, of a chunk of the tensor `name`."""
    return name if chunk.sizes == shape else f"{name}@{','.join(map(str, chunk.offsets))}"


def read_marker(folder: Store) -> Marker:
    """Read a checkpoint's marker, also one of an older version.

    Raises:
        FileNotFoundError: it has none, or the only file of an older version is gone.
        ValueError: it is damaged; one line that names it and what is wrong.
    """
    where = f"{folder.uri}/{MARKER}"
    found = _parsed(folder.read(MARKER), where)
    if not isinstance(found, WholeMarker):
        return found
    file = file_name(found.sha256)
    if found.file != file:
        raise ValueError(f"{where}: file {found.file[:80]!r} is not {file}, as its SHA-256 demands")
    tensors = {name: entry.stored(file) for name, entry in _header(folder, file).items()}
    return Marker(step=found.step, files={file: found.sha256}, tensors=tensors, state=found.state)


def marker_bytes(marker: Marker) -> bytes:
    """Return a marker as it is stored."""
    return json.dumps(marker.model_dump(), separators=(",", ":")).encode()


class _Entry(Config):
    """A tensor in the header of a safetensors file."""

    dtype: Dtype
    shape: Place
    data_offsets: tuple[int, int]

    def stored(self, file: str) -> StoredTensor:
        whole = Chunk(offsets=(0,) * len(self.shape), sizes=self.shape, file=file)
        return StoredTensor(dtype=self.dtype, shape=self.shape, chunks=(whole,))


def _parsed(data: bytes, where: str) -> Marker | WholeMarker:
    with _one_line(where):
        plain = _JSON.validate_json(data)
        if isinstance(plain, dict) and "file" in plain:
            return WholeMarker.model_validate(plain)
        return Marker.model_validate(plain)


def _header(folder: Store, file: str) -> dict[str, _Entry]:
    """Read which tensors a safetensors file holds; the file is checked by its hash when it is read as a whole."""
    with _one_line(f"{folder.uri}/{file}"), folder.open(file) as opened:
        size = int.from_bytes(opened.read(8), "little")
        if size > LARGEST_HEADER:
            raise ValueError(f"a header of {size} bytes")
        plain = _JSON.validate_json(opened.read(size))
        if isinstance(plain, dict):
            plain.pop("__metadata__", None)
        return TypeAdapter(dict[str, _Entry]).validate_python(plain)


@contextmanager
def _one_line(where: str) -> Iterator[None]:
    """Re-raise what is wrong with a file's content as one line that names the file."""
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))[:120]
        raise ValueError(f"{where}: {place}: {first['msg'].removeprefix('Value error, ')}") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _overlap(chunks: Sequence[Chunk]) -> bool:
    """Tell whether any two chunks have an element in common."""
    ordered = sorted(chunks, key=lambda chunk: chunk.offsets)
    for index, chunk in enumerate(ordered):
        for later in ordered[index + 1 :]:
            if later.offsets[:1] >= tuple(chunk.ends[:1]):
                break  # nor do those behind it
            pairs = zip(chunk.offsets, chunk.ends, later.offsets, later.ends, strict=True)
            if all(begin < other_end and other < end for begin, end, other, other_end in pairs):
                return True
    return False
