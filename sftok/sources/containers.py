"""Sources whose images are in containers (tar, Parquet): the driver lists the containers, workers their contents.

Each container is read once, into a small table of its entries and, if it compresses images (Parquet), files with the
uncompressed images. Then every image is a range of bytes of some file, as an ImageFolder's image is a whole file, and
shards are made in the same way from all sources. The alternative, to sort the bytes of each container into buckets of
shards, would write containers x shards pieces: for ImageNet as many as images.
"""

import dataclasses
import functools
import io
import logging
from collections.abc import Iterable, Sequence

import pyarrow.parquet as pq

from infra.artifacts.shards import FileEntry, shard_entry, write_shard
from infra.compute.workers import WorkerOptions, map_shards
from infra.progress import Progress
from infra.store.store import Store
from sftok.config import DataConfig
from sftok.sources.class_ids import unicode_remarks
from sftok.sources.files import FolderReader, is_of_storage, locate, open_files
from sftok.sources.labels import are_numbers, names_of, nothing_labelled
from sftok.sources.listing import POSSIBLE, Container, ContainerTask, Entries, Entry, ParquetEntries, Source, Unpacker
from sftok.sources.patterns import find_files
from sftok.sources.rules import (
    LEFT_OUT,
    OTHER_SPLIT,
    SPLIT_NAMES,
    STRAY_FILE,
    check_one_name_each,
    shown,
    split_word_in,
    splits_by_word,
)

log = logging.getLogger(__name__)

BYTES = "bytes"  # folder of uncompressed images
PIECE_BYTES = 1 << 26


# --- containers


def list_containers(uri: str, suffixes: tuple[str, ...]) -> tuple[str, tuple[Container, ...], Entries]:
    """List containers: their folder, the containers sorted by path, and entries for what is not read.

    Args:
        uri: a folder or prefix, a file, or a pattern such as `s3://bucket/train-{00000..00009}.tar`.
        suffixes: of the containers' names, in lower case.

    Raises:
        ValueError: there are none, a file of the pattern is missing, or there is only a val split.
    """
    files = open_files(uri)
    is_folder = files.exists()
    root, items = (files.uri, list(files.walk(""))) if is_folder else find_files(uri)
    is_named = {item.key: item.problem not in LEFT_OUT and item.key.lower().endswith(suffixes) for item in items}
    if not any(is_named.values()):
        raise ValueError(f"source {uri!r} holds no {suffixes[0]} file: give {POSSIBLE}")
    splits = splits_of(root, [path for path, is_one in is_named.items() if is_one])
    if is_folder:
        _check_one_dataset(root, splits)
    containers, others = list[Container](), list[Entry]()
    for item in sorted(items):
        problem = item.problem or (None if item.key in splits else OTHER_SPLIT if is_named[item.key] else STRAY_FILE)
        if problem is None:
            containers.append(Container(item.key, item.size, item.version, splits[item.key]))
        else:
            version = "" if problem in LEFT_OUT else item.version  # what is not read may change
            others.append(Entry(item.key, item.size, version, problem=problem))
    return root, tuple(containers), Entries.of(others)


def splits_of(root: str, paths: Sequence[str]) -> dict[str, str | None]:
    """Return the split of each path to read, by the name of a folder or its own; None for all: split by hash.

    Raises:
        ValueError: there is a val split and no train split.
    """
    words = {path: split_word_in(path)[0] for path in paths}
    splits = splits_by_word(words.values(), root, "files")
    check_one_name_each({word: word for word in words.values() if word is not None}, root, "files")
    if unread := sorted(path for path, word in words.items() if word not in splits):
        kind = "files without a split" if None in splits else "train and val files"
        log.warning("source %s: only %s are read, not %s", root, kind, _some(unread))
    return {path: splits[word] for path, word in words.items() if word in splits}


def _check_one_dataset(root: str, paths: Iterable[str]) -> None:
    """Refuse folders that each have a split of one name, such as the configurations of a Hugging Face dataset."""
    first: dict[str, tuple[str, str]] = {}
    for path in sorted(paths):
        word, folder = split_word_in(path)
        other, other_folder = first.setdefault(SPLIT_NAMES[word], (path, folder)) if word else (path, folder)
        if other_folder != folder:
            raise ValueError(
                f"source {root!r} holds several datasets, {shown(other)} and {shown(path)}: name one of their folders, "
                f"such as {root}/{other_folder or folder}, or the files of several by a pattern"
            )


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:3])} and {len(names) - 3} more" if len(names) > 3 else ", ".join(names)


# --- contents


def open_containers(source: Source, *, folder: Store, options: WorkerOptions, progress: Progress) -> Source:
    """List the contents of all containers; returns the source with its entries, but class names only if stated.

    Containers whose tables are in `folder` already are not read again.
    """
    assert source.unpack is not None
    tasks = [ContainerTask(container, number, folder) for number, container in enumerate(source.containers)]
    work = functools.partial(_Opener, source.unpack)
    files = map_shards(work, tasks, options=options, progress=progress)
    root = folder.at(BYTES).uri if source.unpack.lays_open else source.unpack.uri
    return dataclasses.replace(
        source,
        entries=ParquetEntries(source.entries, folder, files),
        read=FolderReader(root),
        containers=(),
        unpack=None,
    )


def name_classes(source: Source, found: Iterable[str], config: DataConfig) -> Source:
    """Set a source's class names to those found in its containers, unless they are stated.

    Raises:
        ValueError: labels are required and there are none, or they are both numbers and names.
    """
    names, written = source.class_names, frozenset(found)
    for remark in unicode_remarks(written):
        log.warning("source %s: %s", source.uri, remark)
    if names is None and config.labels != "none":
        names = names_of(written, source.uri)
        if names is None and config.labels == "required":
            raise nothing_labelled(source.uri, source.entries)
    return dataclasses.replace(source, class_names=names, is_declared=source.is_declared or are_numbers(names))


class _Opener:
    """A worker that makes the table of one container per call."""

    def __init__(self, unpack: Unpacker) -> None:
        self.unpack = unpack

    def __call__(self, task: ContainerTask) -> FileEntry:
        name = _name(task)
        if (done := shard_entry(task.folder, name)) is not None:
            return done
        entries = Entries.of(self.unpack(task))
        sink = io.BytesIO()
        pq.write_table(entries.table, sink, compression="zstd")
        return write_shard(task.folder, name, sink.getvalue(), len(entries))


def _name(task: ContainerTask) -> str:
    return f"{task.number:06d}.parquet"


def container_problem(container: Container, reason: str) -> Entry:
    """Make the entry of a damaged container."""
    return Entry(container.path, container.size, split=container.split, problem=reason)


def check_storage(error: Exception, unpack: Unpacker, task: ContainerTask) -> None:
    """Raise the error if storage failed rather than the container, since a rejection is permanent."""
    if is_of_storage(error):
        raise error
    files, path = locate(unpack.uri, task.container.path)
    files.read_range(path, 0, min(1, task.container.size))


class Pieces:
    """Concatenates images into files of at most PIECE_BYTES, each held in memory until it is full."""

    def __init__(self, task: ContainerTask) -> None:
        self.task, self.folder = task, task.folder.at(BYTES)
        self.number, self.size, self.held = 0, 0, list[bytes]()

    def add(self, data: bytes) -> tuple[str, int]:
        """Append an image and return its file and offset."""
        if self.held and self.size + len(data) > PIECE_BYTES:
            self.flush()
        at, self.size = self.size, self.size + len(data)
        self.held.append(data)
        return self._file(), at

    def flush(self) -> None:
        """Write the images held."""
        if self.held:
            self.folder.write(self._file(), b"".join(self.held))
        self.number, self.size = self.number + 1, 0
        self.held.clear()

    def _file(self) -> str:
        return f"{self.task.number:06d}-{self.number:04d}.bin"
