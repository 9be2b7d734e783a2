"""An artifact into another store: every file read, its hash compared, its manifest written last."""

import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from infra.artifacts.manifest import (
    CHUNK,
    MANIFEST,
    ArtifactRef,
    Manifest,
    files_of,
    folder_of,
    key_of,
    manifest_of,
    ref_of,
)
from infra.artifacts.pages import Page
from infra.artifacts.shards import SHARD, FileEntry
from infra.progress import Progress, silent
from infra.store.store import Store

MIB = 1 << 20


class Copied(NamedTuple):
    """What was copied of an artifact."""

    ref: ArtifactRef
    files: int
    bytes: int
    skipped: int
    """files that were there already, of the right size."""
    was_there: bool
    """whether the artifact was finished in that store before."""


def copy_artifact(source: Store, manifest: Manifest, target: Store, *, progress: Progress = silent) -> Copied:
    """Copy an artifact; one that was begun before goes on, and nothing counts before its manifest is there.

    Shards that it shares with another version lie in that one's folder; they are copied to the same place.

    Raises:
        ValueError: a file is missing, or is not what the manifest says: nothing of it is left in the target.
    """
    folder = folder_of(target, manifest.kind, manifest.digest)
    if folder.exists(MANIFEST):
        return Copied(ref_of(target, manifest_of(target, ref_of(target, manifest))), 0, 0, 0, was_there=True)
    total = max(-(-manifest.num_bytes // MIB), 1)
    files = done = skipped = 0
    for key, size, sha256 in _wanted(source, manifest):
        if _has(target, key, size):
            skipped += 1
        else:
            _copy(source, target, key, size, sha256)
            files += 1
        done += size
        progress(min(-(-done // MIB), total), total, {})
    for key in _sidecars(source, manifest):
        target.write(key, source.read(key))
    folder.create(MANIFEST, source.read(f"{manifest.plan.prefix}/{MANIFEST}"))
    return Copied(ref_of(target, manifest), files, done, skipped, was_there=False)


def _wanted(source: Store, manifest: Manifest) -> Iterator[tuple[str, int, str]]:
    """Key, size and hash of pages, then of all files."""
    listed: list[tuple[str, Page]] = [(f"{manifest.plan.prefix}/{page.path}", page) for page in manifest.pages]
    yield from ((key, page.size, page.sha256) for key, page in listed)
    for entry in files_of(source, manifest):
        yield key_of(manifest, entry), entry.size, entry.sha256


def _sidecars(source: Store, manifest: Manifest) -> Iterator[str]:
    """Keys of the sidecars of all shards: an unfinished rerun in the target finds them done."""

    def is_own(entry: FileEntry) -> bool:
        return entry.source is None and SHARD.fullmatch(entry.path) is not None

    yield from (f"{key_of(manifest, entry)}.json" for entry in files_of(source, manifest) if is_own(entry))


def _has(target: Store, key: str, size: int) -> bool:
    try:
        return target.size(key) == size
    except FileNotFoundError:
        return False


def _copy(source: Store, target: Store, key: str, size: int, sha256: str) -> None:
    """Through a file of this machine, so that nothing wrong ever lies in the target."""
    with tempfile.TemporaryDirectory() as place:
        path, found = Path(place) / "file", hashlib.sha256()
        try:
            source.get_file(key, path)
        except FileNotFoundError as error:
            raise ValueError(f"{source.uri}/{key} is missing: run the stage that makes it again") from error
        with path.open("rb") as file:
            while data := file.read(CHUNK):
                found.update(data)
        if found.hexdigest() != sha256:
            raise ValueError(
                f"{source.uri}/{key} is not what {MANIFEST} says ({path.stat().st_size} bytes, {size} expected): "
                "`sftok verify` tells more; run the stage that makes it again"
            )
        target.put_file(key, path)
