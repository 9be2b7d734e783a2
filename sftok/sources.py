"""Where images come from: what a source holds, in which split and class, and how to read one image of it.

A source is listed once, by the driver, without reading pixels; its reader is small and picklable and goes to workers.
Another kind of source is another `list_...` function and another reader.
"""

import errno
import functools
import hashlib
import io
import json
import logging
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

log = logging.getLogger(__name__)

DIGITS = "sklearn:digits"
SPLITS = ("train", "val")
# What operating systems leave behind; besides it, everything in a class folder counts as found.
_LITTER = (".DS_Store", "Thumbs.db", "desktop.ini")
_IMAGE_SUFFIXES = tuple(
    f".{suffix}"
    for suffix in (
        "jpg",
        "jpeg",
        "jpe",
        "jfif",
        "png",
        "gif",
        "bmp",
        "dib",
        "tif",
        "tiff",
        "webp",
        "ppm",
        "pgm",
        "pbm",
        "jp2",
        "avif",
    )
)


class Entry(NamedTuple):
    """One thing that a source holds, image or not."""

    image_id: str  # path within the source, with /
    size: int  # bytes
    mtime_ns: int
    class_name: str | None = None
    split: str | None = None  # None: by hash of the image id
    problem: str | None = None  # why it is rejected without being read


class RejectedEntryError(ValueError):
    """An entry that cannot be read, now or ever; the message is the reason."""


@dataclass(frozen=True)
class Source:
    """A listed source: entries sorted by image id, class names in the order of their ids (None: no labels)."""

    uri: str
    entries: tuple[Entry, ...]
    class_names: tuple[str, ...] | None
    read: Callable[[Entry], bytes]  # raises RejectedEntryError; any other OSError is the storage's and may pass

    @property
    def digest(self) -> str:
        """Hash of every path, size and modification time: equal means that nothing has to be read again."""
        sha256 = hashlib.sha256()
        for entry in self.entries:
            sha256.update(json.dumps([entry.image_id, entry.size, entry.mtime_ns]).encode() + b"\n")
        return sha256.hexdigest()[:32]


def list_source(source: str) -> Source:
    """List `sklearn:digits`, or an ImageFolder: DIR/train/CLASS/* and DIR/val/CLASS/*, or DIR/CLASS/*.

    Raises:
        ValueError: naming the source and the remedy, where it does not exist or has no classes or no images.
    """
    if source == DIGITS:
        return _list_digits()
    if not source:
        raise ValueError(f"no data source is named: give a folder of images, or {DIGITS}")
    if "://" in source and not source.startswith("file://"):
        raise ValueError(f"source {source!r} is neither a local folder nor {DIGITS}")
    return _list_folder(Path(source.removeprefix("file://")).expanduser().absolute())


# --- ImageFolder


@dataclass(frozen=True)
class FolderReader:
    """Reads the files of an ImageFolder."""

    root: str

    def __call__(self, entry: Entry) -> bytes:
        """Return the bytes of a file; one that is gone or forbidden is rejected, other errors are the disk's."""
        try:
            return Path(self.root, entry.image_id).read_bytes()
        except FileNotFoundError as error:
            raise RejectedEntryError("gone since it was listed") from error
        except PermissionError as error:
            raise RejectedEntryError("permission denied") from error


def _list_folder(root: Path) -> Source:
    if not root.is_dir():
        problem = "is not a folder" if root.exists() else "does not exist"
        raise ValueError(f"source {str(root)!r} {problem}: give a folder of images, or {DIGITS}")
    entries: list[Entry] = []
    classes: dict[str, set[str]] = {}
    for prefix, split in _layout(root):
        found = list(_walk_classes(root, prefix, split))
        classes[prefix] = {entry.class_name for entry in found if entry.class_name is not None}
        entries += found
    _check_classes(root, entries, classes)
    entries.sort(key=lambda entry: entry.image_id)
    return Source(str(root), tuple(entries), tuple(sorted(set().union(*classes.values()))), FolderReader(str(root)))


def _layout(root: Path) -> list[tuple[str, str | None]]:
    """Return (folder of class folders, split): train and val, or by hash (None) train alone or the root itself.

    A lone `train` that holds files is a class of vehicles, not a split.
    """
    folders = {item.name for item in _scan(root) if _is_folder(item)}
    present = [split for split in SPLITS if split in folders]
    is_split = len(present) == 2 or (present and all(_is_folder(item) for item in _visible(root / present[0])))
    if not is_split:
        return [("", None)]
    if present == ["val"]:
        raise ValueError(f"source {str(root)!r} has val/CLASS but no train/CLASS: add a train folder")
    if unread := sorted(name for name in folders - set(present) if not name.startswith(".")):
        log.warning("source %s: only %s are read, not %s", root, " and ".join(present), ", ".join(unread))
    if present == ["train"]:
        log.info("source %s has no val folder: a hash of the image ids holds images out", root)
        return [("train/", None)]
    return [(f"{split}/", split) for split in present]


def _walk_classes(root: Path, prefix: str, split: str | None) -> Iterator[Entry]:
    """Everything in the class folders; of what lies beside them, only what is named like an image."""
    above = (_inode(root), _inode(root / prefix))
    for item in _visible(root / prefix):
        if not _is_folder(item):
            if _is_image_name(item.name):
                yield _entry(item, prefix, None, split, "not in a class folder")
            continue
        name = item.name
        if not _is_utf8(name):
            raise ValueError(f"the name of class folder {os.fsencode(item.path)!r} is not UTF-8: rename it")
        inside = list(_walk(Path(item.path), f"{prefix}{name}/", name, split, above))
        if inside:
            yield from inside
        elif _is_image_name(name):
            yield _entry(item, prefix, None, split, "a folder named like an image")
        else:
            raise ValueError(f"class folder {item.path!r} is empty: put images into it, or remove it")


def _walk(
    folder: Path, prefix: str, class_name: str, split: str | None, above: tuple[tuple[int, int], ...]
) -> Iterator[Entry]:
    """Everything below a class folder; symbolic links are followed, unless they lead back up."""
    here = (*above, _inode(folder))
    for item in _scan(folder):
        if not _is_folder(item):
            if item.name not in _LITTER and not item.name.startswith("._"):
                yield _entry(item, prefix, class_name, split)
            continue
        if _inode(item.path) in here:
            yield _entry(item, prefix, class_name, split, "a symbolic link to a folder above it")
            continue
        if _is_image_name(item.name):
            yield _entry(item, prefix, class_name, split, "a folder named like an image")
        yield from _walk(Path(item.path), f"{prefix}{item.name}/", class_name, split, here)


def _entry(
    item: os.DirEntry[str], prefix: str, class_name: str | None, split: str | None, problem: str | None = None
) -> Entry:
    """The entry of a directory item, with the problem that can be seen from outside."""
    size = mtime_ns = 0
    try:
        info = os.stat(item.path)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES):
            raise
        seen = (
            f"broken symbolic link to {os.readlink(item.path)!r}" if item.is_symlink() else "gone while it was listed"
        )
        problem = problem or seen
    else:
        if stat.S_ISREG(info.st_mode):
            size, mtime_ns = info.st_size, info.st_mtime_ns
        elif problem is None:
            problem = "not a regular file"
    image_id = f"{prefix}{item.name}"
    if not _is_utf8(image_id):
        # Parquet strings are UTF-8: the path is listed with its odd bytes escaped.
        image_id, problem = os.fsencode(image_id).decode("utf-8", "backslashreplace"), "the file's name is not UTF-8"
    return Entry(image_id, size, mtime_ns, class_name, split, problem)


def _check_classes(root: Path, entries: Sequence[Entry], classes: dict[str, set[str]]) -> None:
    """Refuse a source without classes or images, or whose splits hold different classes."""
    if not any(classes.values()):
        what = f"holds {len(entries)} images but no class folders" if entries else "holds no images"
        raise ValueError(
            f"source {str(root)!r} {what}: put images into DIR/CLASS/, or into DIR/train/CLASS/ and DIR/val/CLASS/"
        )
    if len(classes) < 2:
        return
    for one, other in (SPLITS, SPLITS[::-1]):
        if missing := sorted(classes[f"{one}/"] - classes[f"{other}/"]):
            raise ValueError(
                f"source {str(root)!r}: class {missing[0]!r} is in {one} and not in {other}"
                f" ({len(missing)} such): both need the same class folders"
            )


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as items:
            return list(items)
    except PermissionError as error:
        raise ValueError(f"folder {str(folder)!r} cannot be listed: allow reading it, or remove it") from error


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    return [item for item in _scan(folder) if not item.name.startswith(".") and item.name not in _LITTER]


def _inode(path: str | os.PathLike[str]) -> tuple[int, int]:
    info = os.stat(path)
    return info.st_dev, info.st_ino


def _is_folder(item: os.DirEntry[str]) -> bool:
    return os.path.isdir(item.path)  # unlike item.is_dir(), no error for a link to itself


def _is_image_name(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in _IMAGE_SUFFIXES


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # bytes of the file system that Python carries as surrogates
        return False
    return True


# --- digits


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits  # here, since importing it takes a second that folders need not pay

    data = load_digits()
    return data.images, data.target


def read_digit(entry: Entry) -> bytes:
    """One of scikit-learn's digits, 8x8 in 17 greys, as the PNG of a 32x32 RGB image (bicubic)."""
    scan = _digits()[0][int(entry.image_id[len("digits/") : -len(".png")])]
    grey = Image.fromarray(np.round(scan * (255 / 16)).astype(np.uint8))
    file = io.BytesIO()
    grey.resize((32, 32), Image.Resampling.BICUBIC).convert("RGB").save(file, "PNG", compress_level=6)
    return file.getvalue()


def _list_digits() -> Source:
    _, labels = _digits()
    entries = (Entry(f"digits/{index:04d}.png", 0, 0, str(label)) for index, label in enumerate(labels))
    sized = tuple(entry._replace(size=len(read_digit(entry))) for entry in entries)
    return Source(DIGITS, sized, tuple(map(str, range(10))), read_digit)
