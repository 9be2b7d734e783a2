"""Local-folder backend of a store: files are written under a temporary name, then renamed or linked."""

import contextlib
import errno
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from infra.store.errors import FULL, name_full_disk
from infra.store.types import FileInfo, UnfinishedWrite

PARTIAL = ".partial-"  # prefix of temporary names, which stores never list
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)


class Disk:
    """Files below `root`, which is created at the first write."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def reach(self) -> None:
        """Create the folder."""
        self.root.mkdir(parents=True, exist_ok=True)

    def size(self, key: str) -> int:
        """Return a file's size in bytes."""
        return self._file(key).stat().st_size

    def read(self, key: str) -> bytes:
        """Read a whole file."""
        with self.open(key) as file:
            return file.read()

    def read_range(self, key: str, start: int, end: int) -> bytes:
        """Read bytes `start` to `end`, the end excluded; fewer if the file ends before."""
        with self.open(key) as file:
            file.seek(start)
            return file.read(end - start)

    def write(self, key: str, data: bytes | memoryview) -> None:
        """Replace a file by rename, so that readers see all of it or none."""
        self._write_atomically(key, lambda partial: _write(partial, data), os.replace)

    def create(self, key: str, data: bytes) -> bool:
        """Create a file by hard link, which fails if the name exists; a rename would overwrite silently."""
        try:
            self._write_atomically(key, lambda partial: _write(partial, data), os.link)
        except FileExistsError:
            return False
        return True

    def put_file(self, key: str, path: Path) -> None:
        """Copy a local file into the store."""
        self._write_atomically(key, lambda partial: _copy(path, partial), os.replace)

    def get_file(self, key: str, path: Path) -> None:
        """Copy a file of the store to a local path."""
        shutil.copyfile(self._file(key), path)

    def scan(self, folder: str) -> Iterator[FileInfo]:
        """List what is directly in a folder, under any name, in no order.

        Raises:
            FileNotFoundError, NotADirectoryError: there is no such folder.
            ValueError: it may not be read.
        """
        path = os.path.join(self.root, folder)
        try:
            with os.scandir(path) as found:
                names = [entry.name for entry in found]
        except PermissionError as error:
            raise ValueError(f"folder {path!r} cannot be listed: allow reading it, or remove it") from error
        for name in names:
            yield _info(f"{folder}{name}", os.path.join(path, name))

    def walk(self, prefix: str) -> Iterator[FileInfo]:
        """List files and folders whose keys start with `prefix`, at any depth.

        Links to folders are followed, unless they lead back up: such a folder has a problem.
        """
        *parts, _ = prefix.split("/")
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            above = tuple(_inode(self.root.joinpath(*parts[:depth])) for depth in range(len(parts)))
            top = FileInfo("".join(f"{part}/" for part in parts))
            yield from (info for info in self._walk(top, above) if info.key.startswith(prefix) and info != top)

    def _walk(self, folder: FileInfo, above: tuple[tuple[int, int], ...]) -> Iterator[FileInfo]:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # removed meanwhile
            inode = _inode(self.root / folder.key)
            if inode in above:
                yield folder._replace(problem="a symbolic link to a folder above it")
                return
            yield folder
            for info in self.scan(folder.key):
                if info.is_folder:
                    yield from self._walk(info, (*above, inode))
                else:
                    yield info

    def unfinished_writes(self, prefix: str) -> Iterator[UnfinishedWrite]:
        """List temporary files and folders below a prefix."""
        for folder, folders, names in os.walk(self.root / prefix):
            for name in [name for name in (*folders, *names) if name.startswith(PARTIAL)]:
                path = Path(folder, name)
                with contextlib.suppress(FileNotFoundError):
                    yield UnfinishedWrite(path.relative_to(self.root).as_posix(), path.stat().st_mtime, "")
            folders[:] = [name for name in folders if not name.startswith(PARTIAL)]

    def discard(self, unfinished: UnfinishedWrite) -> None:
        """Remove a temporary file or folder."""
        path = self.root / unfinished.key
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def delete(self, key: str) -> None:
        """Remove a file."""
        (self.root / key).unlink(missing_ok=True)

    def delete_tree(self, prefix: str) -> None:
        """Remove a folder; its name disappears at once, with markers and files together."""
        gone = self.root / f"{PARTIAL}{uuid.uuid4().hex}"
        try:
            (self.root / prefix).rename(gone)
        except FileNotFoundError:
            return
        shutil.rmtree(gone)

    def open(self, key: str) -> BinaryIO:
        """Open a file for reading."""
        path = self.root / key
        try:
            return path.open("rb")
        except (IsADirectoryError, NotADirectoryError) as error:
            raise FileNotFoundError(errno.ENOENT, "no such file", str(path)) from error

    def explain(self, error: OSError) -> str:
        """Describe an error's cause and remedy in one line."""
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

    def _write_atomically(self, key: str, fill: Callable[[Path], None], settle: Callable[[Path, Path], None]) -> None:
        """Fill a temporary file in the target's folder, then rename or link it to its key."""
        target = self.root / key
        partial = target.with_name(f"{PARTIAL}{uuid.uuid4().hex}")
        with name_full_disk(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                fill(partial)
                settle(partial, target)
            finally:
                partial.unlink(missing_ok=True)


def _info(key: str, path: str) -> FileInfo:
    """Describe a file or folder, and what shows to be wrong with it."""
    try:
        state = os.stat(path)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES):
            raise
        if os.path.islink(path):
            return FileInfo(key, problem=f"broken symbolic link to {os.readlink(path)!r}")
        return FileInfo(key, problem="gone while it was listed")
    if stat.S_ISDIR(state.st_mode):
        return FileInfo(f"{key}/")
    if not stat.S_ISREG(state.st_mode):
        return FileInfo(key, problem="not a regular file")
    return FileInfo(key, state.st_size, state.st_mtime, str(state.st_mtime_ns))


def _inode(path: Path) -> tuple[int, int]:
    state = path.stat()
    return state.st_dev, state.st_ino


def _write(path: Path, data: bytes | memoryview) -> None:
    with path.open("xb") as file:
        file.write(data)
        _sync(file)


def _copy(source: Path, path: Path) -> None:
    with source.open("rb") as read, path.open("xb") as file:
        shutil.copyfileobj(read, file, 1 << 20)
        _sync(file)


def _sync(file: BinaryIO) -> None:
    """Flush to the disk, so that even after a power cut no marker exists without the data it vouches for."""
    file.flush()
    os.fsync(file.fileno())
