"""ImageFolder on disk or S3: DIR/train/CLASS/* and DIR/val/CLASS/*, or DIR/CLASS/*; without classes only on request.

A folder without class folders is more often a wrong path than unlabelled data, and training without labels by mistake
is noticed late; hence `data.labels` has to say so.
"""

import itertools
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from infra.store.disk import Disk
from infra.store.types import FileInfo
from sftok.config import DataConfig
from sftok.images.contract import SPLITS
from sftok.sources.files import FOLDER_AS_IMAGE, Files, FolderReader, is_image_name, is_utf8, open_files, visible
from sftok.sources.labels import stated_names
from sftok.sources.listing import POSSIBLE, Entries, Entry, Source, collect

log = logging.getLogger(__name__)

_UNLABELLED = "or set data.labels = none to go without classes"


class _ClassFolders(NamedTuple):
    """A folder of class folders."""

    prefix: str  # "" or ends with /
    split: str | None  # None: by hash


def list_folder(uri: str, config: DataConfig) -> Source:
    """List an ImageFolder.

    Raises:
        ValueError: it does not exist, has no images, or lacks classes that `config.labels` requires.
    """
    files = open_files(uri)
    check_exists(files)
    parts = _layout(files)
    classes: dict[str, set[str]] = {part.prefix: set() for part in parts}

    def all_entries() -> Iterator[Entry]:
        for part in parts:
            found = _unlabelled(files, part) if config.labels == "none" else _of_classes(files, part, config)
            for folder in found:
                for entry in Entries.of(folder).sorted():
                    if entry.class_name is not None:
                        classes[part.prefix].add(entry.class_name)
                    yield entry

    entries = collect(all_entries())
    if not len(entries):
        raise _empty(files.uri)
    names = None if config.labels == "none" else _check_classes(files.uri, len(entries), classes, config)
    stated = _check_stated(files.uri, names, config)
    is_stated = stated is not None and names is not None
    return Source(files.uri, entries, stated if is_stated else names, FolderReader(files.uri), is_declared=is_stated)


def check_folder(uri: str, config: DataConfig) -> None:
    """Check the top of an ImageFolder: that there are images and class folders, whose contents are not listed.

    Raises:
        ValueError: as `list_folder`, for errors visible from the top.
    """
    files = open_files(uri)
    check_exists(files)
    parts = _layout(files)
    if not any(next(iter(files.walk(part.prefix)), None) for part in parts):
        raise _empty(files.uri)
    if config.labels == "none":
        return
    tops = {part.prefix: visible(files.scan(part.prefix)) for part in parts}
    folders = {prefix: {item.name for item in top if item.is_folder} for prefix, top in tops.items()}
    # A folder named like an image is a class only if it has contents, which only the listing shows.
    if not any(map(is_image_name, set().union(*folders.values()))):
        names = _check_classes(files.uri, sum(map(len, tops.values())), folders, config)
        _check_stated(files.uri, names, config)


def check_exists(files: Files) -> None:
    """Check that a source is an existing folder or prefix.

    Raises:
        ValueError: it is not; says what it is instead.
    """
    if isinstance(files.backend, Disk):
        if not os.path.isdir(files.uri):
            problem = "is not a folder" if os.path.lexists(files.uri) else "does not exist"
            raise ValueError(f"source {files.uri!r} {problem}: give {POSSIBLE}")
    elif next(files.scan(""), None) is None:
        raise ValueError(f"source {files.uri!r} does not exist: there is nothing below that prefix; give {POSSIBLE}")


def _layout(files: Files) -> list[_ClassFolders]:
    """Return train and val, or a single folder to be split by hash: train alone, or the root itself.

    A lone `train` that holds files is a class of vehicles, not a split.
    """
    folders = {item.name for item in files.scan("") if item.is_folder}
    present = [split for split in SPLITS if split in folders]
    is_split = len(present) == 2 or (present and all(item.is_folder for item in visible(files.scan(f"{present[0]}/"))))
    if not is_split:
        return [_ClassFolders("", None)]
    if present == ["val"]:
        raise ValueError(f"source {files.uri!r} has val/CLASS but no train/CLASS: add a train folder")
    if unread := sorted(name for name in folders - set(present) if not name.startswith(".")):
        log.warning("source %s: only %s are read, not %s", files.uri, " and ".join(present), ", ".join(unread))
    if present == ["train"]:
        log.info("source %s has no val folder: a hash of the image ids holds images out", files.uri)
        return [_ClassFolders("train/", None)]
    return [_ClassFolders(f"{split}/", split) for split in present]


def _of_classes(files: Files, part: _ClassFolders, config: DataConfig) -> Iterator[Iterable[Entry]]:
    """Yield the entries of each class folder, and of files beside them that are named like images."""
    for item in visible(files.scan(part.prefix)):
        if not item.is_folder:
            if is_image_name(item.name):
                beside = "not in a class folder" if config.labels == "required" else None
                yield (_entry(item, None, part.split, beside),)
        else:
            yield _of_class(files, item, part.split)


def _of_class(files: Files, item: FileInfo, split: str | None) -> Iterator[Entry]:
    name, path = item.name, item.key.removesuffix("/")
    if not is_utf8(name):
        raise ValueError(f"the name of class folder {os.fsencode(path)!r} is not UTF-8: rename it")
    inside = iter(files.walk(item.key))
    first = next(inside, None)
    if first is None and is_image_name(name):
        yield Entry(path, 0, split=split, problem=FOLDER_AS_IMAGE)
    elif first is None:
        raise ValueError(f"class folder {path!r} is empty: put images into it, or remove it")
    elif first.key == path:
        yield _entry(first, None, split)
    else:
        yield from (_entry(found, name, split) for found in itertools.chain([first], inside))


def _unlabelled(files: Files, part: _ClassFolders) -> Iterator[Iterable[Entry]]:
    """Yield every file at any depth, folder by folder."""
    for item in visible(files.scan(part.prefix)):
        found: Iterable[FileInfo] = files.walk(item.key) if item.is_folder else (item,)
        yield (_entry(inside, None, part.split) for inside in found)


def _entry(item: FileInfo, class_name: str | None, split: str | None, problem: str | None = None) -> Entry:
    return Entry(item.key, item.size, item.version, class_name, split, item.problem or problem)


def _empty(uri: str) -> ValueError:
    return ValueError(f"source {uri!r} holds no images: put images into DIR/CLASS/, {_UNLABELLED}")


def _check_stated(uri: str, names: Sequence[str] | None, config: DataConfig) -> tuple[str, ...] | None:
    """Read the class names of the file, and check that they include those of the folders."""
    stated = stated_names(config)
    if stated is not None and names is not None and (unknown := sorted(set(names) - set(stated))):
        raise ValueError(
            f"source {uri!r}: class folder {unknown[0]!r} is not in data.class_names_file = "
            f"{config.class_names_file!r} ({len(unknown)} such): add it to the file, or remove the folder"
        )
    return stated


def _check_classes(uri: str, count: int, classes: dict[str, set[str]], config: DataConfig) -> tuple[str, ...] | None:
    """Return the names of all classes, and check that there are any, and the same ones in both splits."""
    names = tuple(sorted(set().union(*classes.values())))
    if not names:
        if config.labels == "optional":
            return None
        raise ValueError(
            f"source {uri!r} holds {count} images but no class folders: "
            f"put images into DIR/CLASS/, or into DIR/train/CLASS/ and DIR/val/CLASS/, {_UNLABELLED}"
        )
    if len(classes) == 2:
        _check_same(uri, classes)
    return names


def _check_same(uri: str, classes: dict[str, set[str]]) -> None:
    both: Sequence[tuple[str, str]] = (SPLITS, SPLITS[::-1])
    for one, other in both:
        if missing := sorted(classes[f"{one}/"] - classes[f"{other}/"]):
            raise ValueError(
                f"source {uri!r}: class {missing[0]!r} is in {one} and not in {other}"
                f" ({len(missing)} such): both need the same class folders"
            )
