"""Storage of files in a local folder or under an S3 prefix, behind one small interface.

Writes are atomic (a reader sees the old bytes or the new ones, never a part), and `create` lets exactly one of several
concurrent writers win; markers of finished work are made with it. All calls are idempotent, so they retry while an S3
server is unavailable (`infra.store.s3`); a full disk or bucket raises StoreFullError at once.
"""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from infra.settings import Settings
from infra.store.disk import PARTIAL, Disk
from infra.store.location import parse_location
from infra.store.s3 import Bucket
from infra.store.types import FileInfo, UnfinishedWrite

CHECK = ".check-"

Backend = Disk | Bucket
Names = list[str]  # `list` is a method below


class Store:
    """A folder on local disk or S3; cheap to create, picklable, and free of credentials.

    Args:
        root: "dir", "file:///dir" or "s3://bucket/prefix". The S3 endpoint and credentials come from the usual AWS
            variables or profile (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_PROFILE ...).

    Raises:
        ValueError: the root is empty, of another kind, or contains credentials. Nothing is contacted yet: see `check`.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        place = parse_location(os.fspath(root))
        if place.bucket:
            prefix = "/".join(part for part in place.path.split("/") if part)
            place = place._replace(path=_checked(prefix) if prefix else "")
        self.uri, self._prefix, self._is_root = place.uri, place.prefix, True
        self._backend: Backend = Bucket(place.bucket) if place.bucket else Disk(Path(place.path))

    @classmethod
    def usual(cls, root: str | None) -> "Store":
        """Open a store, or that of SFTOK_STORE if none is named.

        Raises:
            ValueError: as of `Store`; names the variable if it is the reason.
        """
        if root:
            return cls(root)
        default = Settings().store
        try:
            return cls(default)
        except ValueError as error:
            raise ValueError(f"SFTOK_STORE = {str(error).removeprefix('store ')}") from None

    @classmethod
    def beside(cls, file: str) -> "tuple[Store, str]":
        """Open the folder of a file given by its path or URI; returns the file's name, too, empty for a bucket."""
        place = parse_location(file, "file", "a path or s3:// URI")
        folder, _, name = place.path.rpartition("/")
        return cls(place._replace(path=folder if place.bucket else folder or "/").uri), name

    def at(self, *parts: str) -> "Store":
        """Return the folder `parts` below this one; it need not exist.

        Raises:
            ValueError: a part is empty, absolute or contains "..".
        """
        below = Store.__new__(Store)
        joined = "/".join(_checked(part) for part in parts)
        below._backend = self._backend
        below._is_root = self._is_root and not joined
        below._prefix = f"{self._prefix}{joined}/" if joined else self._prefix
        below.uri = f"{self.uri.rstrip('/')}/{joined}" if joined else self.uri
        return below

    @property
    def is_local(self) -> bool:
        """Tell whether the store is a folder on this machine."""
        return isinstance(self._backend, Disk)

    @property
    def path(self) -> Path:
        """Return the local folder's path.

        Raises:
            ValueError: the store is on S3.
        """
        if not isinstance(self._backend, Disk):
            raise ValueError(f"{self.uri} is not a local folder")
        return self._backend.root / self._prefix

    def exists(self, key: str) -> bool:
        """Tell whether the file `key` exists; a folder does not count."""
        try:
            self._backend.size(self._key(key))
        except FileNotFoundError:
            return False
        return True

    def size(self, key: str) -> int:
        """Return the size of the file `key` in bytes; FileNotFoundError if it does not exist."""
        return self._backend.size(self._key(key))

    def read(self, key: str) -> bytes:
        """Read the whole file `key`; FileNotFoundError with the URI if it does not exist."""
        return self._backend.read(self._key(key))

    def write(self, key: str, data: bytes | memoryview) -> None:
        """Write the file atomically, replacing an existing one."""
        self._backend.write(self._key(key), data)

    def create(self, key: str, data: bytes) -> bool:
        """Write the file atomically if it does not exist; return False, with nothing written, if it does.

        Of several concurrent writers exactly one gets True, even one whose first response was lost on the network and
        that had to retry.
        """
        return self._backend.create(self._key(key), data)

    def put_file(self, key: str, path: str | os.PathLike[str]) -> None:
        """Copy the local file `path` to `key` atomically, replacing an existing file."""
        self._backend.put_file(self._key(key), Path(path))

    def get_file(self, key: str, path: str | os.PathLike[str]) -> None:
        """Copy the file `key` to the local `path`, whose folder must exist."""
        target = Path(path)
        partial = target.with_name(f"{PARTIAL}{uuid.uuid4().hex}")
        try:
            self._backend.get_file(self._key(key), partial)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)

    def list(self, prefix: str = "") -> Names:
        """List sorted keys of all files below, at any depth, that start with `prefix`.

        A listing never shows whether work is finished: that is what markers are for.
        """
        return sorted(info.key for info in self.list_info(prefix))

    def list_info(self, prefix: str = "") -> Iterator[FileInfo]:
        """List all files below, as `list` does, with their sizes and times; in arbitrary order."""
        found = self._backend.walk(self._prefix + _start(prefix))
        return self._shown(info for info in found if not info.is_folder)

    def scan(self) -> Iterator[FileInfo]:
        """List files and folders directly in this one, which need not exist; in arbitrary order."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            yield from self._shown(self._backend.scan(self._prefix))

    def _shown(self, found: Iterator[FileInfo]) -> Iterator[FileInfo]:
        """Make keys relative to this folder, and leave out temporary files."""
        relative = (info._replace(key=info.key.removeprefix(self._prefix)) for info in found)
        return (info for info in relative if f"/{PARTIAL}" not in f"/{info.key}")

    def unfinished_writes(self) -> Iterator[UnfinishedWrite]:
        """List what killed writers left below: partial files on disk, multipart uploads on S3; no reader sees them."""
        return self._backend.unfinished_writes(self._prefix)

    def discard(self, unfinished: UnfinishedWrite) -> None:
        """Remove an unfinished write."""
        self._backend.discard(unfinished)

    def folders(self) -> Names:
        """List sorted names of the folders directly below; on S3 an emptied one may still appear for a while."""
        return sorted(info.name for info in self.scan() if info.is_folder)

    def delete(self, key: str) -> None:
        """Remove the file `key`, if it exists."""
        self._backend.delete(self._key(key))

    def delete_tree(self) -> None:
        """Remove everything in this folder, which must lie below the store's root.

        Raises:
            ValueError: this is the root itself.
        """
        if self._is_root:
            raise ValueError(f"refused to delete everything in {self.uri}: name a folder below it")
        self._backend.delete_tree(self._prefix)

    def open(self, key: str) -> BinaryIO:
        """Open the file for random reads, as `pyarrow.parquet.ParquetFile` needs it; close it after use."""
        return self._backend.open(self._key(key))

    def check(self) -> None:
        """Check that the store works: write, create, read and delete a small file.

        Raises:
            ValueError: the store does not work; one line with the URI, the cause and the remedy.
        """
        key = f"{CHECK}{uuid.uuid4().hex}"
        try:
            self._backend.reach()
            is_first, is_second = self.create(key, b"1"), self.create(key, b"2")
            is_same = self.read(key) == b"1"
            self.write(key, b"3")
            is_replaced = self.read(key) == b"3"
            self.delete(key)
        except ValueError as error:
            raise ValueError(f"store {self.uri}: {str(error).partition(': ')[2]}") from error
        except OSError as error:
            raise ValueError(f"store {self.uri}: {self._backend.explain(error)}") from error
        if not is_first or is_second or not is_same:
            raise ValueError(
                f"store {self.uri}: the server ignores If-None-Match, so two runs could publish over each other; "
                "use a server that honours it, such as AWS S3 or SeaweedFS"
            )
        if not is_replaced or self.exists(key):
            raise ValueError(f"store {self.uri}: reads are stale after a write; use a strongly consistent server")

    def _key(self, key: str) -> str:
        return self._prefix + _checked(key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Store) and other.uri == self.uri

    def __hash__(self) -> int:
        return hash(self.uri)

    def __repr__(self) -> str:
        return f"Store({self.uri!r})"


def _checked(key: str) -> str:
    """Return the key if it stays inside its folder; ValueError if not."""
    parts = key.split("/")
    if not key or any(part in ("", ".", "..") for part in parts) or "\\" in key or not key.isprintable():
        raise ValueError(f"key {key!r}: must be a relative path of plain names, without '..'")
    return str(PurePosixPath(key))


def _start(prefix: str) -> str:
    """Check the beginning of a key: a folder with or without its slash, or part of a name."""
    if prefix:
        _checked(prefix.rstrip("/") or "..")
    return prefix
