"""Sources whose images are in containers (tar, Parquet): the driver lists the containers, workers their contents.

Each container is read once, into a small table of its entries and, if it compresses images (Parquet), files with the
uncompressed images. Then every image is a range of bytes of some file, as an ImageFolder's image is a whole file, and
shards are made in the same way from all sources. The alternative, to sort the bytes of each container into buckets of
shards, would write containers x shards pieces: for ImageNet as many as images.
"""

import dataclasses
import functools
import io
import itertools
import logging
import re
from collections.abc import Iterable, Sequence

import pyarrow.parquet as pq

from infra.artifacts.shards import FileEntry, shard_entry, write_shard
from infra.compute.workers import WorkerOptions, map_shards
from infra.progress import Progress
from infra.store.store import Store
from infra.store.types import FileInfo
from sftok.config import DataConfig
from sftok.sources.files import FolderReader, locate, open_files
from sftok.sources.folder import check_exists
from sftok.sources.labels import are_numbers, names_of, no_labels
from sftok.sources.listing import POSSIBLE, Container, ContainerTask, Entries, Entry, ParquetEntries, Source, Unpacker
from sftok.sources.rules import LEFT_OUT, OTHER_SPLIT, STRAY_FILE, check_one_name_each, split_word_in, splits_by_word

log = logging.getLogger(__name__)

BYTES = "bytes"  # folder of uncompressed images
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"([0-9]+)\.\.([0-9]+)")
MOST_NAMES = 1_000_000  # of one pattern


# --- containers


def list_containers(uri: str, suffixes: tuple[str, ...]) -> tuple[str, tuple[Container, ...], Entries]:
    """List containers: their folder, the containers sorted by path, and entries for what is not read.

    Args:
        uri: a folder or prefix, a file, or a pattern such as `s3://bucket/train-{00000..00009}.tar`.
        suffixes: of the containers' names, in lower case.

    Raises:
        ValueError: there are none, a file of the pattern is missing, or there is only a val split.
    """
    if "{" in uri or uri.lower().endswith(suffixes):
        root, items = _named_files(uri)
    else:
        files = open_files(uri)
        check_exists(files)
        root = files.uri
        items = list(files.walk(""))
    is_named = {item.key: item.problem not in LEFT_OUT and item.key.lower().endswith(suffixes) for item in items}
    if not any(is_named.values()):
        raise ValueError(f"source {uri!r} holds no {' or '.join(suffixes)} file: give {POSSIBLE}")
    splits = splits_of(root, [path for path, is_one in is_named.items() if is_one])
    containers, others = list[Container](), list[Entry]()
    for item in sorted(items):
        problem = item.problem or (None if item.key in splits else OTHER_SPLIT if is_named[item.key] else STRAY_FILE)
        if problem is None:
            containers.append(Container(item.key, item.size, item.version, splits[item.key]))
        else:
            version = "" if problem in LEFT_OUT else item.version  # what is not read may change
            others.append(Entry(item.key, item.size, version, problem=problem))
    return root, tuple(containers), Entries.of(others)


def _named_files(uri: str) -> tuple[str, list[FileInfo]]:
    """List the files that a name or pattern stands for, each of which has to exist."""
    head, _, _ = uri.partition("{")
    start = head.rpartition("/")[2]
    files = open_files(head.removesuffix(start) or ".")
    wanted = [name[len(head) - len(start) :] for name in expand(uri)]
    found: dict[str, FileInfo] = {}
    for inner in sorted({name.rpartition("/")[0] for name in wanted}):
        try:
            found |= {item.key: item for item in files.scan(f"{inner}/" if inner else "")}
        except FileNotFoundError:
            continue
    if missing := [name for name in wanted if name not in found]:
        raise ValueError(
            f"source {uri!r}: {missing[0]!r} does not exist ({len(missing)} of {len(wanted)} files): correct the name"
        )
    return files.uri, [found[name] for name in dict.fromkeys(wanted)]


def expand(pattern: str) -> list[str]:
    """Expand a pattern with {00..12} and {a,b} to all names, as a shell does.

    Raises:
        ValueError: braces hold neither a range nor a list, or there are too many names.
    """
    parts: list[Sequence[str]] = []
    for position, text in enumerate(_BRACES.split(pattern)):
        if position % 2 == 0:
            parts.append([text])
        elif match := _RANGE.fullmatch(text):
            width, numbers = len(match[1]), range(int(match[1]), int(match[2]) + 1)
            if len(numbers) > MOST_NAMES:
                raise ValueError(f"source {pattern!r}: {{{text}}} stands for {len(numbers)} files; give a narrower one")
            parts.append([f"{number:0{width}d}" for number in numbers])
        else:
            parts.append(text.split(",") if "," in text else [])
        if not parts[-1]:
            raise ValueError(f"source {pattern!r}: {{{text}}} is no range such as {{00000..00009}} or list {{a,b}}")
    return ["".join(name) for name in itertools.product(*parts)]


def splits_of(root: str, paths: Sequence[str]) -> dict[str, str | None]:
    """Return the split of each path to read, by the name of a folder or its own; None for all: split by hash.

    Raises:
        ValueError: there is a val split and no train split.
    """
    words = {path: split_word_in(path) for path in paths}
    splits = splits_by_word(words.values(), root, "files")
    check_one_name_each({word: word for word in words.values() if word is not None}, root, "files")
    if unread := sorted(path for path, word in words.items() if word not in splits):
        kind = "files without a split" if None in splits else "train and val files"
        log.warning("source %s: only %s are read, not %s", root, kind, _some(unread))
    return {path: splits[word] for path, word in words.items() if word in splits}


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
        has_names=source.unpack.lays_open,
    )


def name_classes(source: Source, found: Iterable[str], config: DataConfig) -> Source:
    """Set a source's class names to those found in its containers, unless they are stated.

    Raises:
        ValueError: labels are required and there are none, or they are both numbers and names.
    """
    names = source.class_names
    if names is None and config.labels != "none":
        names = names_of(found, source.uri)
        if names is None and config.labels == "required":
            raise no_labels(source.uri, f"none of its {len(source.entries)} entries has one")
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
    if isinstance(error, OSError) and (isinstance(error, ConnectionError) or error.errno is not None):
        raise error
    files, path = locate(unpack.uri, task.container.path)
    files.read_range(path, 0, min(1, task.container.size))


def stored_range(task: ContainerTask, piece: int) -> str:
    """Name a file of uncompressed images."""
    return f"{task.number:06d}-{piece:04d}.bin"
