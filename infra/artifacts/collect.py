"""Collect garbage: artifacts that nothing needs, leftovers of killed runs, and unfinished uploads.

A manifest is removed before the files it marks, so a killed collection leaves leftovers, never an artifact that looks
complete. Shards that a kept dataset shares stay in place even if the version that made them is removed.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from infra.artifacts.inventory import Key
from infra.artifacts.manifest import MANIFEST, ROOT, Manifest, files_of
from infra.store.store import Store


class CollectResult(NamedTuple):
    """What a collection removed, or would remove in a dry run."""

    artifacts: tuple[str, ...]
    """kind/digest of removed artifacts."""
    leftovers: tuple[str, ...]
    """folders without a manifest that are too old to be work in progress."""
    uploads: int
    """unfinished files or uploads."""
    files: int
    bytes: int
    shared: int
    """files that stay because a kept dataset shares them."""


def collect(
    store: Store, found: Mapping[Key, Manifest], doomed: Collection[Key], *, before: float, dry_run: bool
) -> CollectResult:
    """Remove artifacts, and what killed runs left.

    Args:
        store: the store to clean up.
        found: all its finished artifacts.
        doomed: the artifacts to remove.
        before: leftovers and uploads last modified before this time, in seconds since 1970, are removed too.
        dry_run: remove nothing, only report.
    """
    shared = set(_shared(store, [manifest for key, manifest in found.items() if key not in doomed]))
    files = size = num_shared = 0
    leftovers: list[str] = []
    for kind, digest in [*sorted(doomed), *_unmarked(store, found)]:
        folder = f"{ROOT}/{kind}/{digest}"
        entries = list(store.list_info(f"{folder}/"))
        going = [entry for entry in entries if entry.key not in shared]
        if (kind, digest) not in doomed:
            if not going or max(entry.modified for entry in going) >= before:
                continue
            leftovers.append(f"{kind}/{digest}")
        num_shared += len(entries) - len(going)
        for entry in sorted(going, key=lambda entry: entry.key != f"{folder}/{MANIFEST}"):
            files, size = files + 1, size + entry.size
            if not dry_run:
                store.delete(entry.key)
    uploads = [upload for upload in store.unfinished_writes() if upload.began < before]
    for upload in [] if dry_run else uploads:
        store.discard(upload)
    names = tuple(f"{kind}/{digest}" for kind, digest in sorted(doomed))
    return CollectResult(names, tuple(leftovers), len(uploads), files, size, num_shared)


def _shared(store: Store, kept: Iterable[Manifest]) -> Iterator[str]:
    """Yield keys of the files that kept artifacts reference in other artifacts' folders, and of their sidecars."""
    for manifest in kept:
        for entry in files_of(store, manifest):
            if entry.source is not None:
                yield entry.source
                yield f"{entry.source}.json"


def _unmarked(store: Store, found: Mapping[Key, Manifest]) -> list[Key]:
    """List folders of unfinished artifacts."""
    root = store.at(ROOT)
    named = [(kind, digest) for kind in root.folders() for digest in root.at(kind).folders()]
    return [key for key in named if key not in found]
