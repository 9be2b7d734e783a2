"""List a source of images of any kind; each kind has a module of its own in this package.

A source is listed once, by the driver, without reading pixels; its reader is small and picklable and is sent to
workers. To add a kind of source, add a `list_...` function and a reader. `check_source` looks at a source beforehand.
"""

import dataclasses
import itertools
import os
from collections.abc import Callable

from infra.store.types import FileInfo
from sftok.config import DataConfig
from sftok.sources.digits import list_digits
from sftok.sources.files import Files, FolderReader, beside, is_image_name, open_files, visible
from sftok.sources.folder import check_exists, check_folder, list_folder
from sftok.sources.index import check_index, is_index, list_index
from sftok.sources.listing import DIGITS, POSSIBLE, Container, Entries, Entry, RejectedEntryError, Source
from sftok.sources.parquet import list_parquet, look_into
from sftok.sources.patterns import is_pattern
from sftok.sources.rules import listed
from sftok.sources.tar import SUFFIXES as TARS
from sftok.sources.tar import list_tars

__all__ = [
    "DIGITS",
    "Entries",
    "Entry",
    "FolderReader",
    "RejectedEntryError",
    "Source",
    "check_source",
    "list_source",
]

KINDS: dict[str, Callable[[str, DataConfig], Source]] = {
    "folder": list_folder,
    "webdataset": list_tars,
    "parquet": list_parquet,
    "index": list_index,
}
# Checks beforehand; tars and Parquet files are few compared with the images in them, and are listed.
CHECKS: dict[str, Callable[[str, DataConfig], object]] = {**KINDS, "folder": check_folder, "index": check_index}
_BY_SUFFIX = {**dict.fromkeys(TARS, "webdataset"), ".parquet": "parquet", ".csv": "index", ".tsv": "index"}
_ARCHIVES = (".zip", ".7z", ".rar", ".tar.bz2", ".tar.xz", ".tar.zst")
_LEVELS = 4  # of folders, and on each
_LOOKED_INTO = 8  # folders looked into to recognise the kind
_SEEN = 1000  # files of a folder looked at to recognise the kind


def list_source(source: str, config: DataConfig | None = None) -> Source:
    """List a source, whose kind is recognised or stated by a prefix (`webdataset:s3://bucket/prefix`).

    Args:
        source: `sklearn:digits`, or a path or s3:// URI of a folder of images, of tars or Parquet files (a folder, one
            file, or a pattern such as `train-{000..999}.tar` or `*.tar`), or of an index; optionally with the prefix
            `folder:`, `webdataset:`, `parquet:` or `index:`.
        config: labels and columns; None for the defaults.

    Raises:
        ValueError: it is none of these, or has no classes or no images; names the source and the remedy.
    """
    config = config or DataConfig(image_size=1)
    if source == DIGITS:
        return list_digits(config)
    kind, uri = _kind_and_place(source, config)
    listed = KINDS[kind](uri, config)
    is_guessed = not source.startswith(f"{kind}:")
    recognised = (f"read as {kind}; write {kind}:{source} to state it",) if is_guessed else ()
    return dataclasses.replace(listed, kind=kind, remarks=(*recognised, *listed.remarks))


def check_source(source: str, config: DataConfig) -> None:
    """Check with a few requests that a source can be listed: its existence, its kind and its first entries.

    `list_source` finds what only a whole listing shows, such as a class folder without images.

    Raises:
        ValueError: it cannot be listed; names the source and the remedy.
    """
    if source != DIGITS:
        kind, uri = _kind_and_place(source, config)
        CHECKS[kind](uri, config)


def absolute_source(source: str) -> str:
    """Return the source with an absolute path, so that it names the same images from any current folder."""
    if not source or source == DIGITS or "://" in source:
        return source
    kind, colon, path = source.partition(":")
    kind, path = (f"{kind}:", path) if colon and kind in KINDS else ("", source)
    return kind + os.path.abspath(os.path.expanduser(path)) if path else source


def _kind_and_place(source: str, config: DataConfig) -> tuple[str, str]:
    """Split a source into its kind and its path or URI."""
    if not source:
        raise ValueError(f"no data source is named: give {POSSIBLE}")
    kind, colon, uri = source.partition(":")
    if not colon or kind not in KINDS:
        kind, uri = _recognised(source, config), source
    if not uri:
        raise ValueError(f"source {source!r} names no place after {kind}: give a path or s3:// URI")
    return kind, uri


def _recognised(uri: str, config: DataConfig) -> str:
    """Recognise the kind of a source by its contents, if it is a folder, or by its name."""
    files = open_files(uri)
    if files.exists():
        return _kind_of_folder(files)
    name = uri.lower()
    kind = next((kind for suffix, kind in _BY_SUFFIX.items() if name.endswith(suffix)), None)
    if kind == "parquet":
        return _kind_of_table(uri, config)
    if kind is None and name.endswith(_ARCHIVES):
        raise ValueError(f"source {uri!r} is an archive of a kind that is not read: unpack it, and name the folder")
    if kind is None and is_pattern(uri):
        raise ValueError(
            f"source {uri!r} is a pattern of neither .tar nor .parquet files: say which, as webdataset:..., or name "
            "the folder"
        )
    if kind is None:
        check_exists(files)
    return kind or "folder"


def _kind_of_table(uri: str, config: DataConfig) -> str:
    """Recognise whether a Parquet file holds images or lists them."""
    files, name = beside(uri)
    try:
        schema, images = look_into(files.uri, [Container(name, 0, "", None)], config.image_column)
    except FileNotFoundError as error:
        if is_pattern(uri):
            return "parquet"
        raise ValueError(f"source {uri!r} does not exist: give {POSSIBLE}") from error
    stated = config.image_column
    if images and (not stated or stated in images or stated not in schema.names):
        return "parquet"
    if is_index(schema, config, uri):
        return "index"
    raise ValueError(
        f"source {uri!r} has the columns {listed(schema.names)}, of which none holds images or paths: "
        "name the column in data.image_column"
    )


def _kind_of_folder(files: Files) -> str:
    """Recognise whether a folder holds tars, Parquet files or images, by its top and its first folders."""
    items, folders = list[FileInfo](), [""]
    for depth in range(_LEVELS):
        found = [item for folder in folders for item in _first_items(files, folder, whole=not depth)]
        items += [item for item in found if not item.is_folder]
        folders = [item.key for item in found if item.is_folder][:_LOOKED_INTO]
        seen = {
            "webdataset": _some(items, *TARS),
            "parquet": _some(items, ".parquet"),
            "folder": [item.key for item in items if is_image_name(item.name)],
        }
        kinds = [kind for kind, paths in seen.items() if paths]
        if depth and kinds:
            break
    if len(kinds) > 1:
        paths = " and ".join(f"{min(seen[kind])} ({kind}:)" for kind in kinds)
        raise ValueError(f"source {files.uri!r} holds {paths}: say which to read, as {kinds[0]}:{files.uri}")
    if not kinds and (tables := _some(items, ".csv", ".tsv", *_ARCHIVES)):
        raise ValueError(
            f"source {files.uri!r} holds {min(tables)} but no images: name an index itself, unpack archives"
        )
    return kinds[0] if kinds else "folder"


def _first_items(files: Files, folder: str, *, whole: bool) -> list[FileInfo]:
    return visible(itertools.islice(files.scan(folder), None if whole else _SEEN))


def _some(items: list[FileInfo], *suffixes: str) -> list[str]:
    return [item.key for item in items if item.name.lower().endswith(suffixes)]
