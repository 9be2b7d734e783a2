"""The files of a source, on disk or S3: listed with a version that changes with them, read whole or by ranges.

Stores allow plain names only; a source's files may have any name, so its files are read past `infra.store.store`.
"""

import functools
import os
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote

from infra.errors import TransientError
from infra.store.disk import Disk
from infra.store.location import SCHEME, parse_location
from infra.store.s3 import Bucket
from infra.store.store import Backend
from infra.store.types import FileInfo
from sftok.sources.listing import POSSIBLE, Entry, RejectedEntryError
from sftok.sources.rules import left_out_part, reason_to_leave_out

_IMAGE_SUFFIXES = frozenset(
    "jpg jpeg jpe jfif png gif bmp dib tif tiff webp ppm pgm pbm pnm jp2 j2k avif".split()  # noqa: SIM905
)
NOT_UTF8 = "the file's name is not UTF-8"
FOLDER_AS_IMAGE = "a folder named like an image"


@dataclass(frozen=True)
class Files:
    """A folder to read from. Paths are relative to it; paths of folders are empty or end with /."""

    uri: str
    backend: Backend
    prefix: str  # of the backend's keys

    def scan(self, folder: str) -> Iterator[FileInfo]:
        """List everything directly in a folder, in no order."""
        for item in self._listed(self.backend.scan(self.prefix + folder)):
            yield item if item.is_folder else _in_utf8(item)

    def walk(self, folder: str) -> Iterator[FileInfo]:
        """List every file below a folder, and folders that are left out or named like images, with that problem.

        Links are followed, but those that lead back up have a problem.
        """
        told: set[str] = set()
        for item in self._listed(self.backend.walk(self.prefix + folder)):
            if (left_out := left_out_part(item.key[len(folder) :])) is not None:
                part, reason = folder + left_out[0], left_out[1]
                if part not in told:
                    told.add(part)
                    yield _in_utf8(FileInfo(part, 0 if part.endswith("/") else item.size, problem=reason))
                continue
            leads_up = item.is_folder and item.problem is not None
            parts = [] if leads_up else item.key[len(folder) :].split("/")[:-1]
            for depth, part in enumerate(parts, 1):
                above = folder + "/".join(parts[:depth])
                if is_image_name(part) and above not in told:
                    told.add(above)
                    yield _in_utf8(FileInfo(above, problem=FOLDER_AS_IMAGE))
            if leads_up:
                yield _in_utf8(item._replace(key=item.key.removesuffix("/")))
            elif not item.is_folder:
                yield _in_utf8(item)

    def exists(self) -> bool:
        """Return whether this is a folder, or a prefix with anything below it."""
        if isinstance(self.backend, Disk):
            return os.path.isdir(self.uri)
        return next(self.scan(""), None) is not None

    def read(self, path: str) -> bytes:
        """Read a file."""
        return self.backend.read(self.prefix + path)

    def read_range(self, path: str, start: int, end: int) -> bytes:
        """Read bytes `start` to `end`, the end excluded; fewer if the file ends before."""
        return self.backend.read_range(self.prefix + path, start, end)

    def open(self, path: str) -> BinaryIO:
        """Open a file for reading."""
        return self.backend.open(self.prefix + path)

    def _listed(self, found: Iterator[FileInfo]) -> Iterator[FileInfo]:
        """Make keys relative to this folder; objects may have parts that no file can have."""
        if isinstance(self.backend, Disk):
            yield from found
            return
        for info in found:
            path = info.key[len(self.prefix) :]
            is_odd = not (info.is_folder or {"", ".", ".."}.isdisjoint(path.split("/")))  # clients resolve them in URLs
            yield info._replace(key=path, problem="its path has an empty part, '.' or '..'" if is_odd else None)


@functools.lru_cache(maxsize=16)
def _bucket(name: str) -> Bucket:
    """Make a client, one per bucket and process; credentials stay in the environment."""
    return Bucket(name)


def open_files(uri: str) -> Files:
    """Open a local folder or an S3 prefix; no request is made yet.

    Raises:
        ValueError: it is neither, or the URI holds credentials.
    """
    place = parse_location(uri, "source", POSSIBLE)
    return Files(place.uri, _bucket(place.bucket) if place.bucket else Disk(Path(place.path)), place.prefix)


def locate(uri: str, path: str) -> tuple[Files, str]:
    """Return the files and the path in them for `path`, which is relative to `uri`, absolute, or a URI itself."""
    return beside(path) if path.startswith("/") or SCHEME.match(path) else (open_files(uri), path)


def beside(uri: str) -> tuple[Files, str]:
    """Open the folder of a file; return it and the file's name."""
    folder, slash, name = uri.rpartition("/")
    return open_files(folder or slash or "."), unquote(name) if uri.startswith("file://") else name


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


def is_of_storage(error: Exception) -> bool:
    """Return whether an error is of storage; for damaged files pyarrow and gzip raise OSError without a number."""
    return isinstance(error, OSError) and (isinstance(error, ConnectionError) or error.errno is not None)


def is_image_name(name: str) -> bool:
    """Return whether a file is named like an image."""
    return posixpath.splitext(name)[1][1:].lower() in _IMAGE_SUFFIXES


def visible(items: Iterator[FileInfo]) -> list[FileInfo]:
    """Sort items so that the contents of all are in order, without those that are left out."""
    return sorted(item for item in items if not reason_to_leave_out(item.name, is_folder=item.is_folder))


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


def _in_utf8(item: FileInfo) -> FileInfo:
    """Escape a path that Parquet cannot hold, which is a problem with the file."""
    return item if is_utf8(item.key) else item._replace(key=escaped(item.key), problem=NOT_UTF8)
