"""Files of an artifact: their entries in manifests, and shards, which are finished once their sidecar exists."""

import hashlib
import math
import re
from collections.abc import Iterable
from typing import TypeVar

from pydantic import Field, NonNegativeInt, ValidationError

from infra.config import Config
from infra.store.store import Store

C = TypeVar("C", bound=Config)

SHARD = re.compile(r"(?:[0-9a-f]{2}/)?(?P<split>[a-z]+)-(?P<index>\d{5,})-of-(?P<total>\d{5,})\.parquet")
SPREAD_FROM = 4096  # shards of a split; S3 limits requests per second for each prefix, and a folder is one prefix


class FileEntry(Config):
    """A file of an artifact, with what is needed to check it."""

    path: str = Field(description="relative to the artifact's folder")
    size: NonNegativeInt = Field(description="bytes")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    rows: NonNegativeInt | None = Field(None, description="rows of a table; None for other files")
    source: str | None = Field(
        None,
        exclude_if=lambda source: source is None,  # keeps manifests without references byte-identical to older ones
        description="key below the store's root, for a file in another artifact's folder; None: in this artifact's",
    )


def shard_name(split: str, index: int, total: int) -> str:
    """Return a shard's path in its artifact's folder; more than 4,096 per split are spread over 256 folders by hash."""
    name = f"{split}-{index:05d}-of-{total:05d}.parquet"
    return name if total <= SPREAD_FROM else f"{hashlib.sha256(name.encode()).hexdigest()[:2]}/{name}"


def common_divisors(totals: Iterable[int], most: int) -> list[int]:
    """Return the common divisors of `totals` up to `most`, ascending.

    Shard i of n and shard j of m can hold the same hash only if i and j are congruent modulo each of them.
    """
    common = math.gcd(*totals) or 1
    return [number for number in range(1, min(common, most) + 1) if common % number == 0]


def split_of(path: str) -> str | None:
    """Return the split that a shard belongs to; None for other files."""
    match = SHARD.fullmatch(path)
    return match["split"] if match else None


def put(folder: Store, name: str, data: bytes, rows: int | None = None) -> FileEntry:
    """Write a file into an artifact's folder."""
    folder.write(name, data)
    return FileEntry(path=name, size=len(data), sha256=hashlib.sha256(data).hexdigest(), rows=rows)


def write_shard(folder: Store, name: str, data: bytes, rows: int) -> FileEntry:
    """Write a shard, then its sidecar; a finished shard is left alone.

    Raises:
        ValueError: another run finished the shard with different bytes.
    """
    entry = FileEntry(path=name, size=len(data), sha256=hashlib.sha256(data).hexdigest(), rows=rows)
    done = shard_entry(folder, name)
    if done is None:
        folder.write(name, data)
        is_first = folder.create(_sidecar(name), entry.model_dump_json().encode())
        done = entry if is_first else shard_entry(folder, name)
    if done != entry:
        raise ValueError(f"{folder.uri}/{name}: two runs disagree about its content; delete the folder and run again")
    return entry


def shard_entry(folder: Store, name: str) -> FileEntry | None:
    """Read the entry of a finished shard from its sidecar; None if it is not finished."""
    entry = read_record(folder, _sidecar(name), FileEntry)
    if entry is not None and entry.path != name:
        raise ValueError(f"{folder.uri}/{_sidecar(name)} is the sidecar of {entry.path!r}; delete it and run again")
    return entry


def read_record(folder: Store, name: str, kind: type[C]) -> C | None:
    """Read a small JSON file as a config of this kind; None if it does not exist.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        return kind.model_validate_json(folder.read(name))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "file"
        raise ValueError(f"{folder.uri}/{name}: {where}: {first['msg']}; delete the folder and run again") from error


def _sidecar(name: str) -> str:
    return f"{name}.json"
