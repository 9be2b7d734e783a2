"""Where things are kept: one small surface over a local folder and an S3 prefix.

Writes are atomic (a reader sees the old bytes or the new ones, never a part), and `create` lets exactly one of many
writers win, which is what markers of finished work are made with. Every call may be repeated, so an S3 server that is
away for a while is waited for in the call (`infra.store.s3`); a full disk or bucket is a StoreFullError at once.
"""

import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol
from urllib.parse import unquote

from infra.store.disk import Disk
from infra.store.s3 import Bucket
from infra.store.types import Abandoned, Stored

SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")
BUCKET = re.compile(r"^[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]$")
CHECK = ".check-"

Names = list[str]  # `list` is a method below


class Backend(Protocol):
    """What a place to keep files has to offer; keys are relative to its root and already checked."""

    def reach(self) -> None: ...  # noqa: D102
    def size(self, key: str) -> int: ...  # noqa: D102
    def read(self, key: str) -> bytes: ...  # noqa: D102
    def write(self, key: str, data: bytes) -> None: ...  # noqa: D102
    def create(self, key: str, data: bytes) -> bool: ...  # noqa: D102
    def put_file(self, key: str, path: Path) -> None: ...  # noqa: D102
    def get_file(self, key: str, path: Path) -> None: ...  # noqa: D102
    def keys(self, prefix: str) -> Iterator[str]: ...  # noqa: D102
    def stored(self, prefix: str) -> Iterator[Stored]: ...  # noqa: D102
    def abandoned(self, prefix: str) -> Iterator[Abandoned]: ...  # noqa: D102
    def discard(self, found: Abandoned) -> None: ...  # noqa: D102
    def folders(self, prefix: str) -> Iterator[str]: ...  # noqa: D102
    def delete(self, key: str) -> None: ...  # noqa: D102
    def delete_tree(self, prefix: str) -> None: ...  # noqa: D102
    def open(self, key: str) -> BinaryIO: ...  # noqa: D102
    def explain(self, error: OSError) -> str: ...  # noqa: D102


class Store:
    """A folder on local disk or S3; cheap, picklable, and free of credentials.

    Args:
        root: "dir", "file:///dir" or "s3://bucket/prefix". The S3 endpoint and credentials come from the usual AWS
            variables or profile (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_PROFILE ...).

    Raises:
        ValueError: the root is empty, of another kind, or carries credentials. Nothing is contacted yet: see `check`.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.uri, self._backend = _open_root(os.fspath(root))
        self._prefix = ""

    def at(self, *parts: str) -> "Store":
        """The folder `parts` below this one; it need not exist.

        Raises:
            ValueError: a part is empty, absolute or contains "..".
        """
        below = Store.__new__(Store)
        joined = "/".join(_checked(part) for part in parts)
        below._backend = self._backend
        below._prefix = f"{self._prefix}{joined}/" if joined else self._prefix
        below.uri = f"{self.uri.rstrip('/')}/{joined}" if joined else self.uri
        return below

    @property
    def is_local(self) -> bool:
        """Whether it is a folder of this machine."""
        return isinstance(self._backend, Disk)

    @property
    def path(self) -> Path:
        """The local folder.

        Raises:
            ValueError: the store is on S3.
        """
        if not isinstance(self._backend, Disk):
            raise ValueError(f"{self.uri} is not a local folder")
        return self._backend.root / self._prefix

    def exists(self, key: str) -> bool:
        """Whether the file `key` exists; a folder does not count."""
        try:
            self._backend.size(self._key(key))
        except FileNotFoundError:
            return False
        return True

    def size(self, key: str) -> int:
        """Bytes in the file `key`; FileNotFoundError if there is none."""
        return self._backend.size(self._key(key))

    def read(self, key: str) -> bytes:
        """The file's bytes; FileNotFoundError naming the URI if there is none."""
        return self._backend.read(self._key(key))

    def write(self, key: str, data: bytes) -> None:
        """Write the file at once, replacing what was there."""
        self._backend.write(self._key(key), data)

    def create(self, key: str, data: bytes) -> bool:
        """Write the file at once if there is none; False, and nothing written, if there is.

        Of several writers at the same time exactly one gets True, also where its first answer was lost on the network
        and it had to ask again.
        """
        return self._backend.create(self._key(key), data)

    def put_file(self, key: str, path: str | os.PathLike[str]) -> None:
        """Copy the local file `path` to `key` at once, replacing what was there."""
        self._backend.put_file(self._key(key), Path(path))

    def get_file(self, key: str, path: str | os.PathLike[str]) -> None:
        """Copy the file `key` to the local `path`, whose folder must exist."""
        target = Path(path)
        partial = target.with_name(f".partial-{uuid.uuid4().hex}")
        try:
            self._backend.get_file(self._key(key), partial)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)

    def list(self, prefix: str = "") -> Names:
        """Sorted keys of all files below, at any depth, that start with `prefix`; never tells whether work is done."""
        return sorted(key.removeprefix(self._prefix) for key in self._backend.keys(self._prefix + _start(prefix)))

    def stored(self, prefix: str = "") -> Iterator[Stored]:
        """All files below, as `list`, with their sizes and times; in no order."""
        for found in self._backend.stored(self._prefix + _start(prefix)):
            yield found._replace(key=found.key.removeprefix(self._prefix))

    def abandoned(self) -> Iterator[Abandoned]:
        """What killed writers left below: unfinished files on disk, unfinished uploads on S3; no reader sees them."""
        return self._backend.abandoned(self._prefix)

    def discard(self, found: Abandoned) -> None:
        """Remove something abandoned."""
        self._backend.discard(found)

    def folders(self) -> Names:
        """Sorted names of the folders directly below; on S3 one that was emptied may show for a while."""
        return sorted(self._backend.folders(self._prefix))

    def delete(self, key: str) -> None:
        """Remove the file `key`, if it is there."""
        self._backend.delete(self._key(key))

    def delete_tree(self) -> None:
        """Remove everything in this folder, which must be one below a store's root.

        Raises:
            ValueError: this is the root itself.
        """
        if not self._prefix:
            raise ValueError(f"refused to delete everything in {self.uri}: name a folder below it")
        self._backend.delete_tree(self._prefix)

    def open(self, key: str) -> BinaryIO:
        """The file for reading at random, as `pyarrow.parquet.ParquetFile` wants it; close it after use."""
        return self._backend.open(self._key(key))

    def check(self) -> None:
        """Write, create, read and delete a small file.

        Raises:
            ValueError: it does not work; one line that names the URI, the cause and the remedy.
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


def _open_root(root: str) -> tuple[str, Backend]:
    """The canonical URI of a root and its backend."""
    if not root.strip():
        raise ValueError("store: the location is empty; give a folder or s3://bucket/prefix")
    found = SCHEME.match(root)
    scheme = found.group(1).lower() if found else ""
    if scheme == "s3":
        return _open_bucket(root)
    if scheme == "file":
        host, _, path = root[len("file://") :].partition("/")
        if host not in ("", "localhost"):
            raise ValueError(f"store file://{_hidden(host)}/...: a folder of another machine; write file:///folder")
        root = unquote("/" + path)
    elif scheme:
        raise ValueError(f"store {scheme}://...: unknown kind of store; give a folder or s3://bucket/prefix")
    folder = Path(os.path.abspath(Path(root).expanduser()))
    return str(folder), Disk(folder)


def _open_bucket(root: str) -> tuple[str, Backend]:
    bucket, _, prefix = root[len("s3://") :].partition("/")
    if "@" in bucket:
        raise ValueError(
            f"store s3://{_hidden(bucket)}: credentials do not belong in a URI; "
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE"
        )
    if not BUCKET.match(bucket):
        raise ValueError(
            f"store s3://{bucket}: not a bucket name (3 to 63 small letters, digits, dashes); write s3://bucket/prefix"
        )
    prefix = "/".join(part for part in prefix.split("/") if part)
    if prefix:
        _checked(prefix)
    return f"s3://{bucket}/{prefix}".rstrip("/"), Bucket(bucket, prefix)


def _hidden(host: str) -> str:
    """A host or bucket without the credentials before it."""
    return host.rpartition("@")[2]


def _checked(key: str) -> str:
    """A key that stays inside its folder."""
    parts = key.split("/")
    if not key or any(part in ("", ".", "..") for part in parts) or "\\" in key or not key.isprintable():
        raise ValueError(f"key {key!r}: must be a relative path of plain names, without '..'")
    return str(PurePosixPath(key))


def _start(prefix: str) -> str:
    """The beginning of a key: a folder with or without its slash, or part of a name."""
    if prefix:
        _checked(prefix.rstrip("/") or "..")
    return prefix
