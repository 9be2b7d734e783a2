"""A local folder as a place to keep files: temporary name, then rename or link."""

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from infra.store.errors import FULL, room_at
from infra.store.types import Abandoned, Stored

PARTIAL = ".partial-"  # temporary names: never listed
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)


class Disk:
    """Files below `root`, which is made at the first write."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def reach(self) -> None:
        """Make the folder."""
        self.root.mkdir(parents=True, exist_ok=True)

    def size(self, key: str) -> int:
        """Bytes in a file."""
        return self._file(key).stat().st_size

    def read(self, key: str) -> bytes:
        """All bytes of a file."""
        return self._file(key).read_bytes()

    def write(self, key: str, data: bytes) -> None:
        """Replace a file by rename, which readers see at once or not at all."""
        self._place(key, lambda partial: _write(partial, data), os.replace)

    def create(self, key: str, data: bytes) -> bool:
        """Make a file by hard link, which fails where the name exists; a rename would overwrite silently."""
        try:
            self._place(key, lambda partial: _write(partial, data), os.link)
        except FileExistsError:
            return False
        return True

    def put_file(self, key: str, path: Path) -> None:
        """Copy a file in."""
        self._place(key, lambda partial: _copy(path, partial), os.replace)

    def get_file(self, key: str, path: Path) -> None:
        """Copy a file out."""
        shutil.copyfile(self._file(key), path)

    def keys(self, prefix: str) -> Iterator[str]:
        """Keys that start with `prefix`."""
        top = self.root / prefix.rpartition("/")[0]
        for folder, _, names in os.walk(top):
            base = Path(folder).relative_to(self.root)
            keys = ((base / name).as_posix() for name in names if not name.startswith(PARTIAL))
            yield from (key for key in keys if key.startswith(prefix))

    def stored(self, prefix: str) -> Iterator[Stored]:
        """Files that start with `prefix`."""
        for key in self.keys(prefix):
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                state = (self.root / key).stat()
                yield Stored(key, state.st_size, state.st_mtime)

    def abandoned(self, prefix: str) -> Iterator[Abandoned]:
        """Temporary files and folders below a prefix."""
        for folder, folders, names in os.walk(self.root / prefix):
            for name in [name for name in (*folders, *names) if name.startswith(PARTIAL)]:
                path = Path(folder, name)
                with contextlib.suppress(FileNotFoundError):
                    yield Abandoned(path.relative_to(self.root).as_posix(), path.stat().st_mtime, "")
            folders[:] = [name for name in folders if not name.startswith(PARTIAL)]

    def discard(self, found: Abandoned) -> None:
        """Remove a temporary file or folder."""
        path = self.root / found.key
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def folders(self, prefix: str) -> Iterator[str]:
        """Names of the folders directly below a prefix."""
        folder = self.root / prefix
        if folder.is_dir():
            yield from (p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(PARTIAL))

    def delete(self, key: str) -> None:
        """Remove a file."""
        (self.root / key).unlink(missing_ok=True)

    def delete_tree(self, prefix: str) -> None:
        """Remove a folder; it disappears under its name at once, markers and files together."""
        gone = self.root / f"{PARTIAL}{uuid.uuid4().hex}"
        try:
            (self.root / prefix).rename(gone)
        except FileNotFoundError:
            return
        shutil.rmtree(gone)

    def open(self, key: str) -> BinaryIO:
        """A file for reading."""
        return self._file(key).open("rb")

    def explain(self, error: OSError) -> str:
        """Cause and remedy in one line."""
        cause = error.strerror or str(error)
        if error.errno in NO_LINKS and error.filename2 is not None:
            return f"its file system has no hard links ({cause}); choose a folder on a local disk, or S3"
        if error.errno in FULL:
            return f"no space left ({cause}); free some or choose another folder"
        return f"cannot be written ({cause}); choose a folder that you may write to"

    def _file(self, key: str) -> Path:
        path = self.root / key
        if not path.is_file():
            raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
        return path

    def _place(self, key: str, fill: Callable[[Path], None], settle: Callable[[Path, Path], None]) -> None:
        """Fill a temporary file in the target's folder, then give it its name."""
        target = self.root / key
        partial = target.with_name(f"{PARTIAL}{uuid.uuid4().hex}")
        with room_at(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                fill(partial)
                settle(partial, target)
            finally:
                partial.unlink(missing_ok=True)


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        _sync(file)


def _copy(source: Path, path: Path) -> None:
    with source.open("rb") as read, path.open("xb") as file:
        shutil.copyfileobj(read, file, 1 << 20)
        _sync(file)


def _sync(file: BinaryIO) -> None:
    """A marker must not outlive the data that it vouches for, not even a power cut."""
    file.flush()
    os.fsync(file.fileno())
