"""Copy an artifact to another store: each file is checked against its hash, the manifest is written last."""

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
    size_of,
)
from infra.artifacts.pages import Page
from infra.artifacts.shards import SHARD, FileEntry
from infra.progress import Progress, silent
from infra.store.store import Store

MIB = 1 << 20


class CopyResult(NamedTuple):
    """The result of copying an artifact."""

    ref: ArtifactRef
    files: int
    bytes: int
    skipped: int
    """files that existed already with the right size."""
    was_there: bool
    """whether the target already had the finished artifact."""


def copy_artifact(source: Store, manifest: Manifest, target: Store, *, progress: Progress = silent) -> CopyResult:
    """Copy an artifact, resuming an interrupted copy; the copy is valid only once its manifest is there.

    Shards that it shares with another version lie in that version's folder; they are copied to the same place.

    Raises:
        ValueError: a file is missing or does not match the manifest; nothing of that file is left in the target.
    """
    folder = folder_of(target, manifest.kind, manifest.digest)
    if folder.exists(MANIFEST):
        return CopyResult(ref_of(target, manifest_of(target, ref_of(target, manifest))), 0, 0, 0, was_there=True)
    total = max(-(-manifest.num_bytes // MIB), 1)
    files = done = skipped = 0
    for key, size, sha256 in _files_to_copy(source, manifest):
        if size_of(target, key) == size:
            skipped += 1
        else:
            _copy(source, target, key, size, sha256)
            files += 1
        done += size
        progress(min(-(-done // MIB), total), total, {})
    for key in _sidecars(source, manifest):
        target.write(key, source.read(key))
    folder.create(MANIFEST, source.read(f"{manifest.plan.prefix}/{MANIFEST}"))
    return CopyResult(ref_of(target, manifest), files, done, skipped, was_there=False)


def _files_to_copy(source: Store, manifest: Manifest) -> Iterator[tuple[str, int, str]]:
    """Yield key, size and hash of the manifest's pages, then of all files."""
    pages: list[tuple[str, Page]] = [(f"{manifest.plan.prefix}/{page.path}", page) for page in manifest.pages]
    yield from ((key, page.size, page.sha256) for key, page in pages)
    for entry in files_of(source, manifest):
        yield key_of(manifest, entry), entry.size, entry.sha256


def _sidecars(source: Store, manifest: Manifest) -> Iterator[str]:
    """Yield keys of all shards' sidecars, by which an interrupted rerun in the target finds the shards finished."""

    def is_own(entry: FileEntry) -> bool:
        return entry.source is None and SHARD.fullmatch(entry.path) is not None

    yield from (f"{key_of(manifest, entry)}.json" for entry in files_of(source, manifest) if is_own(entry))


def _copy(source: Store, target: Store, key: str, size: int, sha256: str) -> None:
    """Copy one file through local disk, so that the target never holds unchecked bytes."""
    with tempfile.TemporaryDirectory() as place:
        path, actual = Path(place) / "file", hashlib.sha256()
        try:
            source.get_file(key, path)
        except FileNotFoundError as error:
            raise ValueError(f"{source.uri}/{key} is missing: rerun the stage that makes it") from error
        with path.open("rb") as file:
            while data := file.read(CHUNK):
                actual.update(data)
        if actual.hexdigest() != sha256:
            raise ValueError(
                f"{source.uri}/{key} is not what {MANIFEST} says ({path.stat().st_size} bytes, {size} expected): "
                "`sftok verify` tells more; rerun the stage that makes it"
            )
        target.put_file(key, path)
