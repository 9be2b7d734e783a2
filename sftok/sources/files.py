"""The files of a source, on disk or S3: listed with a version that changes with them, read whole or by ranges.

Stores allow plain names only; a source's files may have any name, so it is not read through `infra.store.store`.
"""

import errno
import functools
import io
import os
import posixpath
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol
from urllib.parse import unquote

from infra.errors import TransientError
from infra.store.s3 import Bucket
from infra.store.store import BUCKET
from sftok.sources.listing import POSSIBLE, Entry, RejectedEntryError

# Files that operating systems leave behind; everything else in a class folder counts as found.
_LITTER = (".DS_Store", "Thumbs.db", "desktop.ini")
_IMAGE_SUFFIXES = frozenset(
    "jpg jpeg jpe jfif png gif bmp dib tif tiff webp ppm pgm pbm pnm jp2 j2k avif".split()  # noqa: SIM905
)
_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://")
NOT_UTF8 = "the file's name is not UTF-8"


class Item(NamedTuple):
    """A file or folder in a listing."""

    path: str  # relative to the files' root, with /
    size: int = 0  # bytes
    version: str = ""  # modification time in ns, or etag
    problem: str | None = None  # reason why it cannot be read
    is_folder: bool = False

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]


class Files(Protocol):
    """A folder to read from. Paths are relative to it; paths of folders are empty or end with /."""

    @property
    def uri(self) -> str: ...  # noqa: D102
    def scan(self, folder: str) -> Iterator[Item]: ...  # noqa: D102
    def walk(self, folder: str) -> Iterator[Item]: ...  # noqa: D102
    def read(self, path: str) -> bytes: ...  # noqa: D102
    def read_range(self, path: str, start: int, end: int) -> bytes: ...  # noqa: D102
    def open(self, path: str) -> BinaryIO: ...  # noqa: D102


def open_files(uri: str) -> Files:
    """Open a local folder or an S3 prefix; no request is made yet.

    Raises:
        ValueError: it is neither, or the URI holds credentials.
    """
    if uri.startswith("s3://"):
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        if "@" in bucket:
            raise ValueError(
                f"source s3://{bucket.rpartition('@')[2]}: credentials do not belong in a URI; "
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE"
            )
        if not BUCKET.match(bucket):
            raise ValueError(f"source s3://{bucket}: not a bucket name; write s3://bucket/prefix")
        return S3Files(bucket, prefix.strip("/"))
    if uri.startswith("file://"):
        uri = unquote(uri.removeprefix("file://"))
    elif _SCHEME.match(uri):
        raise ValueError(f"source {uri!r} is neither a local path nor on S3: give {POSSIBLE}")
    return LocalFiles(os.path.abspath(os.path.expanduser(uri)))


def locate(uri: str, path: str) -> tuple[Files, str]:
    """Return the files and the path in them for `path`, which is relative to `uri`, absolute, or a URI itself."""
    if path.startswith("/") or _SCHEME.match(path):
        head, _, name = path.rpartition("/")
        return open_files(head or "/"), unquote(name) if path.startswith("file://") else name
    return open_files(uri), path


def beside(uri: str) -> tuple[Files, str]:
    """Open the folder of a file; return it and the file's name."""
    folder, slash, name = uri.rpartition("/")
    return open_files(folder or slash or "."), name


@dataclass(frozen=True)
class FolderReader:
    """Reads images that are files, or ranges of files, below a folder or prefix."""

    root: str

    def __call__(self, entry: Entry) -> bytes:
        """Read the bytes of an image; other errors than those below are the storage's.

        Raises:
            RejectedEntryError: it is gone, forbidden, or its file is too short.
            TransientError: its size has changed, so the source has to be listed again.
        """
        files, path = locate(self.root, entry.file) if entry.file else (open_files(self.root), entry.image_id)
        try:
            if entry.offset is None:
                return _as_listed(entry, files.read(path))
            data = files.read_range(path, entry.offset, entry.offset + entry.size)
        except FileNotFoundError as error:
            raise RejectedEntryError("gone since it was listed") from error
        except PermissionError as error:
            raise RejectedEntryError("permission denied") from error
        if len(data) < entry.size:
            raise RejectedEntryError("its file is shorter than when it was listed")
        return data


def _as_listed(entry: Entry, data: bytes) -> bytes:
    if len(data) != entry.size:
        raise TransientError(
            f"{entry.image_id!r} has {len(data)} bytes, {entry.size} when it was listed: the source changed, and is "
            "listed again"
        )
    return data


def is_image_name(name: str) -> bool:
    """Return whether a file is named like an image."""
    return posixpath.splitext(name)[1][1:].lower() in _IMAGE_SUFFIXES


def is_litter(name: str) -> bool:
    """Return whether a file was left behind by an operating system."""
    return name in _LITTER or name.startswith("._")


def visible(items: Iterator[Item]) -> list[Item]:
    """Sort items by name, without the hidden ones."""
    return sorted(item for item in items if not item.name.startswith(".") and not is_litter(item.name))


def is_utf8(name: str) -> bool:
    """Return whether Parquet can hold a name: Python represents undecodable bytes of file names as surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def escaped(name: str) -> str:
    """Escape the bytes of a name that are not UTF-8."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


# --- disk


@dataclass(frozen=True)
class LocalFiles:
    """Files below a local folder."""

    uri: str

    def scan(self, folder: str) -> Iterator[Item]:
        """List everything directly in a folder, in no order."""
        path = os.path.join(self.uri, folder)
        try:
            with os.scandir(path) as found:
                items = list(found)
        except PermissionError as error:
            raise ValueError(f"folder {path!r} cannot be listed: allow reading it, or remove it") from error
        for item in items:
            if os.path.isdir(item.path):  # unlike item.is_dir(), it raises no error for a link to itself
                yield Item(f"{folder}{item.name}", is_folder=True)
            else:
                yield _described(f"{folder}{item.name}", item.path)

    def walk(self, folder: str) -> Iterator[Item]:
        """List every file below a folder; links are followed, but those that lead back up have a problem."""
        parts = folder.rstrip("/").split("/") if folder else []
        above = [_inode(os.path.join(self.uri, *parts[:depth])) for depth in range(len(parts))]
        if folder and _inode(os.path.join(self.uri, folder)) in above:
            yield Item(folder.rstrip("/"), problem="a symbolic link to a folder above it")
            return
        yield from self._walk(folder, tuple(above))

    def _walk(self, folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[Item]:
        here = (*above, _inode(os.path.join(self.uri, folder)))
        for item in self.scan(folder):
            if not item.is_folder:
                if not is_litter(item.name):
                    yield item
                continue
            if _inode(os.path.join(self.uri, item.path)) in here:
                yield _named(item.path, problem="a symbolic link to a folder above it")
                continue
            if is_image_name(item.name):
                yield _named(item.path, problem="a folder named like an image")
            yield from self._walk(f"{item.path}/", here)

    def read(self, path: str) -> bytes:
        """Read a file."""
        return Path(self.uri, path).read_bytes()

    def read_range(self, path: str, start: int, end: int) -> bytes:
        """Read bytes `start` to `end`, the end excluded; fewer if the file ends before."""
        with open(os.path.join(self.uri, path), "rb") as file:
            file.seek(start)
            return file.read(end - start)

    def open(self, path: str) -> BinaryIO:
        """Open a file for reading."""
        return open(os.path.join(self.uri, path), "rb")


def _described(path: str, where: str) -> Item:
    """Make the item of a file, with any problem that shows without opening it."""
    try:
        info = os.stat(where)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES):
            raise
        if os.path.islink(where):
            return _named(path, problem=f"broken symbolic link to {escaped(os.readlink(where))!r}")
        return _named(path, problem="gone while it was listed")
    if not stat.S_ISREG(info.st_mode):
        return _named(path, problem="not a regular file")
    return _named(path, info.st_size, str(info.st_mtime_ns))


def _named(path: str, size: int = 0, version: str = "", problem: str | None = None) -> Item:
    # Parquet strings are UTF-8, so other bytes of the path are escaped.
    return Item(path, size, version, problem) if is_utf8(path) else Item(escaped(path), size, version, NOT_UTF8)


def _inode(path: str) -> tuple[int, int]:
    info = os.stat(path)
    return info.st_dev, info.st_ino


# --- S3


class _ListingBucket(Bucket):
    """A bucket whose listings include sizes and etags."""

    def contents(self, prefix: str, *, one_level: bool) -> Iterator[dict[str, Any]]:
        """List pages of objects, and common prefixes if `one_level`."""
        return self._pages(prefix, **({"Delimiter": "/"} if one_level else {}))


@functools.lru_cache(maxsize=16)
def _bucket(name: str) -> _ListingBucket:
    """Make a client, one per bucket and process; credentials stay in the environment."""
    return _ListingBucket(name, "")


@dataclass(frozen=True)
class S3Files:
    """Files below a prefix of a bucket."""

    bucket: str
    prefix: str

    @property
    def uri(self) -> str:
        """URI of the prefix."""
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def scan(self, folder: str) -> Iterator[Item]:
        """List everything directly in a folder."""
        start = self._key(folder)
        skip = len(start) - len(folder)
        for page in _bucket(self.bucket).contents(start, one_level=True):
            for found in page.get("CommonPrefixes", ()):
                yield Item(found["Prefix"][skip:].rstrip("/"), is_folder=True)
            for found in page.get("Contents", ()):
                if not found["Key"].endswith("/"):
                    yield _listed(found, skip)

    def walk(self, folder: str) -> Iterator[Item]:
        """List every file below a folder, and prefixes that on a disk would be folders named like images."""
        start = self._key(folder)
        skip = len(start) - len(folder)
        told: set[str] = set()
        for page in _bucket(self.bucket).contents(start, one_level=False):
            for found in page.get("Contents", ()):
                item = _listed(found, skip)
                parts = item.path[len(folder) :].split("/")
                for depth, part in enumerate(parts[:-1], 1):
                    above = folder + "/".join(parts[:depth])
                    if is_image_name(part) and above not in told:
                        told.add(above)
                        yield Item(above, problem="a folder named like an image")
                if item.name and not is_litter(item.name):
                    yield item

    def read(self, path: str) -> bytes:
        """Read an object."""
        return _bucket(self.bucket).read(self._key(path))

    def read_range(self, path: str, start: int, end: int) -> bytes:
        """Read bytes `start` to `end`, the end excluded."""
        return _bucket(self.bucket).read_range(self._key(path), start, end) if end > start else b""

    def open(self, path: str) -> BinaryIO:
        """Open an object for reading; recent blocks are cached, since tar and Parquet readers step back a little."""
        opened = _bucket(self.bucket).open(self._key(path))
        assert isinstance(opened, io.BufferedIOBase)
        return opened

    def _key(self, path: str) -> str:
        return f"{self.prefix}/{path}" if self.prefix else path


def _listed(found: dict[str, Any], skip: int) -> Item:
    path = found["Key"][skip:]
    parts = path.split("/")
    problem = "its path has an empty part, '.' or '..'" if {".", ".."} & set(parts) or "" in parts[:-1] else None
    return Item(path, found["Size"], found["ETag"].strip('"'), problem)
