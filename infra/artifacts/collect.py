"""Collecting what nothing stands on any more: artifacts, leftovers of killed runs, and unfinished uploads.

A manifest is removed before what it marks, so that a collection which is killed leaves leftovers and never an artifact
that looks whole. Shards that a kept dataset shares stay where they are, though the version that made them goes.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from infra.artifacts.inventory import Key
from infra.artifacts.manifest import MANIFEST, ROOT, Manifest, files_of
from infra.store.store import Store


class Collected(NamedTuple):
    """What was removed, or would be."""

    artifacts: tuple[str, ...]
    """kind/digest of what nothing stands on."""
    leftovers: tuple[str, ...]
    """folders without a manifest, old enough not to be at work."""
    uploads: int
    """unfinished files or uploads."""
    files: int
    bytes: int
    shared: int
    """files that stay because a kept dataset has them, too."""


def collect(
    store: Store, found: Mapping[Key, Manifest], doomed: Collection[Key], *, before: float, dry_run: bool
) -> Collected:
    """Remove artifacts, and what killed runs left.

    Args:
        store: where.
        found: all its finished artifacts.
        doomed: those that go.
        before: leftovers and uploads that were last touched before this time, in seconds since 1970, go, too.
        dry_run: remove nothing, only tell.
    """
    shared = set(_shared(store, [manifest for key, manifest in found.items() if key not in doomed]))
    files = size = stay = 0
    left: list[str] = []
    for kind, digest in [*sorted(doomed), *_unmarked(store, found)]:
        folder = f"{ROOT}/{kind}/{digest}"
        entries = list(store.stored(f"{folder}/"))
        going = [entry for entry in entries if entry.key not in shared]
        if (kind, digest) not in doomed:
            if not going or max(entry.modified for entry in going) >= before:
                continue
            left.append(f"{kind}/{digest}")
        stay += len(entries) - len(going)
        for entry in sorted(going, key=lambda entry: entry.key != f"{folder}/{MANIFEST}"):
            files, size = files + 1, size + entry.size
            if not dry_run:
                store.delete(entry.key)
    uploads = [upload for upload in store.abandoned() if upload.began < before]
    for upload in [] if dry_run else uploads:
        store.discard(upload)
    names = tuple(f"{kind}/{digest}" for kind, digest in sorted(doomed))
    return Collected(names, tuple(left), len(uploads), files, size, stay)


def _shared(store: Store, kept: Iterable[Manifest]) -> Iterator[str]:
    """Keys of the files that kept artifacts have in other artifacts' folders, and of their sidecars."""
    for manifest in kept:
        for entry in files_of(store, manifest):
            if entry.source is not None:
                yield entry.source
                yield f"{entry.source}.json"


def _unmarked(store: Store, found: Mapping[Key, Manifest]) -> list[Key]:
    """Folders of artifacts that are not finished."""
    root = store.at(ROOT)
    named = [(kind, digest) for kind in root.folders() for digest in root.at(kind).folders()]
    return [key for key in named if key not in found]
