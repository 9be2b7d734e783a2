"""WebDataset: tar files of samples, the members KEY.jpg (or .png ...), KEY.cls and KEY.json; KEY ends at the first dot.

Nothing is extracted: only headers and labels of a tar are read, and an image is a range of the tar's bytes. Tars that
are compressed by gzip are read as a whole, and their images are copied to files of ranges, as those of Parquet are.
"""

import gzip
import json
import re
import struct
import sys
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

from sftok.config import DataConfig
from sftok.sources.containers import Pieces, check_storage, container_problem, list_containers
from sftok.sources.files import (
    FOLDER_AS_IMAGE,
    NOT_UTF8,
    FolderReader,
    escaped,
    is_image_name,
    is_utf8,
    open_files,
)
from sftok.sources.labels import class_of, stated_names
from sftok.sources.listing import Container, ContainerTask, Entry, RejectedEntryError, Source, Unpacker
from sftok.sources.rules import left_out_part, listed

SUFFIXES = (".tar", ".tar.gz", ".tgz")
_LABELS = ("label", "class")  # fields of a .json
_LARGEST_LABEL = 1 << 20  # bytes of a .cls or .json
_LARGEST_COPIED = 1 << 30  # bytes of an image that is held in memory
_BLOCK = 512
_GZIP = b"\x1f\x8b"
_DAMAGED_GZIP = (EOFError, zlib.error, gzip.BadGzipFile)
_DAMAGE = (tarfile.TarError, ValueError, IndexError, OverflowError, struct.error, *_DAMAGED_GZIP)


def list_tars(uri: str, config: DataConfig) -> Source:
    """List the tar files of a WebDataset: a folder, one file, or a pattern."""
    root, containers, broken = list_containers(uri, SUFFIXES)
    names = stated_names(config)
    return Source(
        uri=root,
        entries=broken,
        class_names=names,
        read=FolderReader(root),
        is_declared=names is not None,
        containers=containers,
        unpack=TarUnpacker(
            root,
            config.labels != "none",
            names,
            lays_open=not all(container.path.lower().endswith(".tar") for container in containers),
            is_required=config.labels == "required",
        ),
    )


@dataclass
class _Sample:
    """The members of one key."""

    images: list[tuple[str, str, int, int]] = field(default_factory=list)  # name, file, offset, size
    labels: dict[str, bytes | str] = field(default_factory=dict)  # of .cls and .json; a string is a problem
    others: list[str] = field(default_factory=list)  # suffixes


@dataclass(frozen=True)
class TarUnpacker(Unpacker):
    """Lists the images of a tar file; picklable."""

    lays_open: bool = False  # some tars are compressed, so images are copied
    is_required: bool = False  # an image without a label is rejected

    def __call__(self, task: ContainerTask) -> Iterator[Entry]:
        """List an entry per image and per unusable member, and one more for a damaged tar."""
        container = task.container
        samples: dict[str, _Sample] = {}
        told: set[str] = set()
        damage, pieces = None, Pieces(task) if self.lays_open else None
        with open_files(self.uri).open(container.path) as stored:
            is_compressed = stored.read(2) == _GZIP
            stored.seek(0)
            file = stored
            if is_compressed and self.lays_open:
                file, container = cast(BinaryIO, gzip.GzipFile(fileobj=stored)), container._replace(size=sys.maxsize)
            try:
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    while (member := tar.next()) is not None:
                        tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep all members
                        yield from self._take(tar, member, samples, told, container, pieces)
                    damage = _after(file, tar.offset, container.size)
            except _DAMAGE as error:
                check_storage(error, self, task)  # storage may raise ValueError, too
                damage = f"the tar is damaged: {' '.join(str(error).split())[:200] or type(error).__name__}"
                if is_compressed and not self.lays_open:
                    damage = "the tar is compressed: rename it to .tar.gz"
        if pieces is not None:
            pieces.flush()
        for key, sample in samples.items():
            yield from self._entries(key, sample, container)
        if damage is not None:
            yield container_problem(task.container, damage)

    def _take(
        self,
        tar: tarfile.TarFile,
        member: tarfile.TarInfo,
        samples: dict[str, _Sample],
        told: set[str],
        container: Container,
        pieces: Pieces | None,
    ) -> Iterator[Entry]:
        """Add a member to its sample, or yield an entry with the reason why it belongs to none; hidden folders once."""
        name = "/".join(part for part in member.name.split("/") if part not in ("", "."))
        folder, _, base = name.rpartition("/")
        left_out = left_out_part(f"{name}/" if member.isdir() else name)
        if left_out is not None and not _leads_out(member):
            part, reason = left_out
            if part not in told:
                told.add(part)
                size = 0 if part.endswith("/") else member.size
                yield Entry(escaped(f"{container.path}/{part}"), size, split=container.split, problem=reason)
            return
        if member.isdir() and not is_image_name(base):
            return
        problem = _member_problem(member, container)
        if pieces is not None and member.size > _LARGEST_COPIED:
            problem = f"it has {member.size} bytes, too many to copy from a compressed tar"
        if problem is not None:
            shown = escaped(f"{container.path}/{member.name}")
            yield Entry(shown, member.size, split=container.split, problem=problem)
            return
        key, dot, suffix = base.partition(".")
        sample = samples.setdefault(f"{folder}/{key}" if folder else key, _Sample())
        suffix = suffix.lower()
        if dot and is_image_name(base):
            place = (container.path, member.offset_data) if pieces is None else pieces.add(_content(tar, member))
            sample.images.append((name, *place, member.size))
        elif suffix in ("cls", "json") and suffix not in sample.labels:
            sample.labels[suffix] = _label(tar, member) if self.is_labelled else ""
        else:
            sample.others.append(suffix)

    def _entries(self, key: str, sample: _Sample, container: Container) -> Iterator[Entry]:
        """Yield the image of a sample, and its other images as rejected."""
        if not sample.images:
            members = listed(sorted({*sample.labels, *sample.others} - {""}) or ["no suffix"])
            problem = f"no image among its members ({members}): name images .jpg, .png or the like"
            yield Entry(f"{container.path}/{key}", 0, split=container.split, problem=problem)
            return
        # KEY.jpg is preferred to KEY.seg.png, which holds something else about the same image.
        taken = next((image for image in sample.images if image[0].count(".") == key.count(".") + 1), sample.images[0])
        class_name, unlabelled = self._class(sample)
        for image in sample.images:
            name, file, offset, size = image
            entry = Entry(f"{container.path}/{name}", size, split=container.split, file=file, offset=offset)
            if image is taken:
                yield entry._replace(class_name=class_name, problem=unlabelled)
            elif name == taken[0]:
                yield entry._replace(problem="the tar holds a member of this name before")
            else:
                yield entry._replace(problem="a second image of one key")

    def _class(self, sample: _Sample) -> tuple[str | None, str | None]:
        """Return the class of a sample, or the problem with it."""
        try:
            return class_of(self._label(sample) if self.is_labelled else None, self.class_names), None
        except RejectedEntryError as error:
            return None, str(error)

    def _label(self, sample: _Sample) -> object:
        """Return the label of a sample; .cls precedes .json, and "label" precedes "class"."""
        if "cls" in sample.labels:
            return _checked(sample.labels["cls"])
        fields = _fields(_checked(sample.labels["json"])) if "json" in sample.labels else {}
        for name in _LABELS:
            if fields.get(name) is not None:
                return fields[name]
        if self.is_required and fields.keys().isdisjoint(_LABELS) and (sample.labels or sample.others):
            suffixes = {image[0].rpartition("/")[2].partition(".")[2] for image in sample.images}
            json_fields = f"; .json has {listed(fields)}" if fields else ""
            dots = "; a key ends at its first dot" if any("." in suffix for suffix in sample.others) else ""
            members = listed(sorted(suffixes.union(sample.labels, sample.others)))
            raise RejectedEntryError(f"no label among its members ({members}{json_fields}{dots})")
        return None


def _leads_out(member: tarfile.TarInfo) -> bool:
    return member.name.startswith("/") or ".." in re.split(r"[/\\]", member.name)


def _member_problem(member: tarfile.TarInfo, container: Container) -> str | None:
    if _leads_out(member):
        return "its path leads out of the tar"
    if member.issym() or member.islnk():
        return f"a link to {escaped(member.linkname)[:200]!r}"
    if member.isdir():
        return FOLDER_AS_IMAGE
    if not member.isreg() or member.issparse():
        return "not a regular file"
    if not is_utf8(member.name):
        return NOT_UTF8
    if member.offset_data + member.size > container.size:
        return "truncated: the tar ends before it"
    return None


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | str:
    """Read a small member's bytes; return a string with the reason if it is too large."""
    if member.size > _LARGEST_LABEL:
        return f"its label has {member.size} bytes"
    return _content(tar, member)


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)  # reads in memory; nothing is written
    assert file is not None
    return file.read()


def _checked(label: bytes | str) -> bytes:
    if isinstance(label, str):
        raise RejectedEntryError(label)
    return label


def _fields(text: bytes) -> dict[str, Any]:
    try:
        fields: Any = json.loads(text)
    except ValueError as error:  # also UnicodeDecodeError
        raise RejectedEntryError("its .json cannot be read") from error
    except RecursionError as error:
        raise RejectedEntryError("its .json is nested too deeply") from error
    return fields if isinstance(fields, dict) else {}


def _after(file: BinaryIO, offset: int, size: int) -> str | None:
    """Return why a tar may hold more than tarfile has read, which stops silently; None if it ends properly."""
    if offset >= size:
        return f"the tar has no end mark: it may be truncated at byte {size}"
    file.seek(offset)
    block = file.read(_BLOCK)
    if not block:
        return f"the tar has no end mark: it may be truncated at byte {offset}"
    if any(block):
        return f"the tar is damaged at byte {offset}: what follows is not read"
    while more := file.read(1 << 20):
        if any(more):
            return f"the tar goes on after its end mark at byte {offset}: that is not read"
    return None
