"""ImageFolder on disk or S3: DIR/train/CLASS/* and DIR/val/CLASS/*, or DIR/CLASS/*; without classes only on request.

A folder without class folders is more often a wrong path than unlabelled data, and training without labels by mistake
is noticed late; hence `data.labels` has to say so.
"""

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from infra.store.disk import Disk
from infra.store.types import FileInfo
from sftok.config import DataConfig
from sftok.images.contract import SPLITS
from sftok.sources.class_ids import class_name, ordered, shared_names, unicode_remarks
from sftok.sources.files import FOLDER_AS_IMAGE, Files, FolderReader, is_image_name, is_utf8, open_files, visible
from sftok.sources.labels import stated_names
from sftok.sources.listing import POSSIBLE, Entries, Entry, Source, collect
from sftok.sources.rules import (
    LEFT_OUT,
    OTHER_SPLIT,
    SPLIT_NAMES,
    STRAY_FILE,
    check_one_name_each,
    reason_to_leave_out,
    split_word,
    splits_by_word,
)

log = logging.getLogger(__name__)

_UNLABELLED = "or set data.labels = none to go without classes"


class _ClassFolders(NamedTuple):
    """A folder of class folders."""

    prefix: str  # "" or ends with /
    split: str | None  # None: by hash
    unread: frozenset[str] = frozenset()  # names of folders that are another split


def list_folder(uri: str, config: DataConfig) -> Source:
    """List an ImageFolder.

    Raises:
        ValueError: it does not exist, has no images, or lacks classes that `config.labels` requires.
    """
    files = open_files(uri)
    check_exists(files)
    parts = _layout(files)
    classes: dict[_ClassFolders, set[str]] = {part: set() for part in parts}
    found, written = 0, set[str]()

    def all_entries() -> Iterator[Entry]:
        nonlocal found
        for part, entries in _entries(files, parts, config):
            for entry in Entries.of(entries).sorted():
                if part is not None and entry.class_name is not None:
                    classes[part].add(entry.class_name)
                    written.add(entry.image_id[len(part.prefix) :].partition("/")[0])
                found += entry.problem not in LEFT_OUT
                yield entry

    entries = collect(all_entries())
    if not found:
        raise _empty(files.uri)
    names = None if config.labels == "none" else _check_classes(files.uri, found, classes, config)
    stated = _check_stated(files.uri, names, config)
    is_stated = stated is not None and names is not None
    return Source(
        files.uri,
        entries,
        stated if is_stated else names,
        FolderReader(files.uri),
        is_declared=is_stated,
        remarks=(
            *(f"{part.split or 'all images'}: {part.prefix}" for part in parts if part.prefix),
            *unicode_remarks(written),
        ),
    )


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
    tops = {part: [item for item in visible(files.scan(part.prefix)) if item.name not in part.unread] for part in parts}
    folders = {part: {class_name(item.name) for item in top if item.is_folder} for part, top in tops.items()}
    # A folder named like an image is a class only if it has contents, which only the listing shows.
    if not any(map(is_image_name, set().union(*folders.values()))):
        names = _check_classes(files.uri, sum(map(len, tops.values())), folders, config)
        _check_stated(files.uri, names, config)


def check_exists(files: Files) -> None:
    """Check that a source is an existing folder or prefix.

    Raises:
        ValueError: it is not; says what it is instead.
    """
    if files.exists():
        return
    if isinstance(files.backend, Disk):
        problem = "is not a folder" if os.path.lexists(files.uri) else "does not exist"
        raise ValueError(f"source {files.uri!r} {problem}: give {POSSIBLE}")
    raise ValueError(f"source {files.uri!r} does not exist: there is nothing below that prefix; give {POSSIBLE}")


# --- splits


def _layout(files: Files) -> list[_ClassFolders]:
    """Return the folders of class folders: those named like splits, or the root itself, which is split by hash.

    A single folder called `train` that holds images is a class of vehicles, not a split.
    """
    folders = [item.name for item in visible(files.scan("")) if item.is_folder]
    words = {name: split_word(name) for name in folders}
    named = [name for name, word in words.items() if word is not None]
    if len({SPLIT_NAMES[word] for word in words.values() if word is not None}) < 2:
        named = [name for name in named if _holds_classes(files, name)]
    if not named:
        return [_ClassFolders("", None)]
    splits = splits_by_word(words.values(), files.uri, "folders")
    read = {name: splits[word] for name, word in words.items() if word in splits}
    if None in splits:  # class folders beside a test split
        log.warning("source %s: not read: %s", files.uri, ", ".join(named))
        return [_ClassFolders("", None, frozenset(named))]
    check_one_name_each(words, files.uri, "folders")
    if unread := [name for name in folders if name not in read]:
        log.warning("source %s: only %s are read, not %s", files.uri, " and ".join(read), ", ".join(unread))
    if len(read) == 1:
        log.info("source %s has no val folder: a hash of the image ids holds images out", files.uri)
    return [_ClassFolders(f"{name}/", split) for name, split in read.items()]


def _holds_classes(files: Files, folder: str) -> bool:
    """Return whether a folder holds folders and no images; other files say nothing."""
    items = visible(files.scan(f"{folder}/"))
    return any(item.is_folder for item in items) and not any(
        is_image_name(item.name) for item in items if not item.is_folder
    )


# --- entries

_Listed = Iterator[tuple[_ClassFolders | None, Iterable[Entry]]]


def _entries(files: Files, parts: Sequence[_ClassFolders], config: DataConfig) -> _Listed:
    """Yield the entries of the source, folder by folder and sorted, each with the part that it belongs to."""
    by_prefix = {part.prefix: part for part in parts}
    if (root := by_prefix.get("")) is not None:
        yield from ((root, entries) for entries in _of_part(files, root, config))
        return
    for item in sorted(files.scan("")):
        if (part := by_prefix.get(item.key)) is not None:
            yield from ((part, entries) for entries in _of_part(files, part, config))
        else:
            reason = reason_to_leave_out(item.name, is_folder=item.is_folder)
            reason = reason or (OTHER_SPLIT if item.is_folder else STRAY_FILE)
            yield None, (_entry(item, None, None, reason),)


def _of_part(files: Files, part: _ClassFolders, config: DataConfig) -> Iterator[Iterable[Entry]]:
    """Yield the entries of each folder in a part, and of the files beside them."""
    for item in sorted(files.scan(part.prefix)):
        if reason := reason_to_leave_out(item.name, is_folder=item.is_folder):
            yield (_entry(item, None, part.split, reason),)
        elif item.is_folder and item.name in part.unread:
            yield (_entry(item, None, part.split, OTHER_SPLIT),)
        elif config.labels == "none":
            found: Iterable[FileInfo] = files.walk(item.key) if item.is_folder else (item,)
            yield (_entry(inside, None, part.split) for inside in found)
        elif item.is_folder:
            yield _of_class(files, item, part.split)
        elif is_image_name(item.name):
            yield (_entry(item, None, part.split, "not in a class folder" if config.labels == "required" else None),)
        else:
            yield (_entry(item, None, part.split, STRAY_FILE),)


def _of_class(files: Files, item: FileInfo, split: str | None) -> Iterator[Entry]:
    name, path = item.name, item.key.removesuffix("/")
    if not is_utf8(name):
        raise ValueError(f"the name of class folder {os.fsencode(path)!r} is not UTF-8: rename it")
    is_empty, left_out = True, False
    for inside in files.walk(item.key):
        if inside.key == path:  # a link to a folder above it
            yield _entry(inside, None, split)
            return
        is_left_out = inside.problem in LEFT_OUT
        is_empty, left_out = is_empty and is_left_out, left_out or is_left_out
        yield _entry(inside, class_name(name), split)
    if is_empty and not is_image_name(name):
        holds = "holds only hidden files" if left_out else "is empty"
        raise ValueError(f"class folder {path!r} {holds}: put images into it, or remove it")
    if is_empty:
        yield Entry(path, 0, split=split, problem=FOLDER_AS_IMAGE)


def _entry(item: FileInfo, found: str | None, split: str | None, problem: str | None = None) -> Entry:
    problem = item.problem or problem
    version = "" if problem in LEFT_OUT else item.version  # what is not read may change
    return Entry(item.key, item.size, version, found, split, problem)


def _empty(uri: str) -> ValueError:
    return ValueError(f"source {uri!r} holds no images: put images into DIR/CLASS/, {_UNLABELLED}")


# --- classes


def _check_stated(uri: str, names: Sequence[str] | None, config: DataConfig) -> tuple[str, ...] | None:
    """Read the class names of the file, and check that they include those of the folders."""
    stated = stated_names(config)
    if stated is None or names is None:
        return stated
    file = f"data.class_names_file = {config.class_names_file!r}"
    if unknown := sorted(set(names) - set(stated)):
        raise ValueError(
            f"source {uri!r}: class folder {unknown[0]!r} is not in {file} ({len(unknown)} such): add it to the file, "
            "or remove the folder"
        )
    for name, ids in shared_names(stated).items():
        if name in names and (missing := [other for other in map(stated.__getitem__, ids) if other not in names]):
            raise ValueError(
                f"source {uri!r}: class folder {name!r} is the name of {len(ids)} classes in {file}: rename the "
                f"folders to {name!r} and {missing[0]!r}"
            )
    return stated


def _check_classes(
    uri: str, count: int, classes: Mapping[_ClassFolders, set[str]], config: DataConfig
) -> tuple[str, ...] | None:
    """Return the names of all classes, and check that there are any, and the same ones in both splits."""
    names = ordered(set().union(*classes.values()))
    if not names:
        if config.labels == "optional":
            return None
        raise ValueError(
            f"source {uri!r} holds {count} images but no class folders: "
            f"put images into DIR/CLASS/, or into DIR/train/CLASS/ and DIR/val/CLASS/, {_UNLABELLED}"
        )
    if len(classes) == 2:
        _check_same(uri, {part.split: found for part, found in classes.items()})
    return names


def _check_same(uri: str, classes: Mapping[str | None, set[str]]) -> None:
    both: Sequence[tuple[str, str]] = (SPLITS, SPLITS[::-1])
    for one, other in both:
        if missing := sorted(classes[one] - classes[other]):
            raise ValueError(
                f"source {uri!r}: class {missing[0]!r} is in {one} and not in {other}"
                f" ({len(missing)} such): both need the same class folders"
            )
