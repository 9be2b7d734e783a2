"""List all artifacts of a store and their dependencies in both directions, and pin artifacts."""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

from pydantic import Field

from infra.artifacts.manifest import ROOT, ArtifactRef, Manifest, read_manifest
from infra.artifacts.shards import read_record
from infra.config import Config
from infra.store.store import Store

PINS = "pins"
READERS = 16  # manifests read at once

Key = tuple[str, str]  # kind, digest


class Pin(Config):
    """A mark that keeps an artifact, and all its inputs, from garbage collection."""

    kind: str
    digest: str
    reason: str = Field("", description="why it is pinned, for whoever finds the pin later")
    pinned_at: str = Field(description="ISO 8601, UTC")


def key_of_ref(ref: ArtifactRef | Manifest) -> Key:
    """Return the kind and digest that identify an artifact within a store."""
    return ref.kind, ref.digest


def manifests(store: Store, kind: str | None = None) -> dict[Key, Manifest]:
    """Read the manifests of all finished artifacts, or of those of one kind, sorted by kind and time.

    Raises:
        ValueError: a manifest is damaged.
    """
    root = store.at(ROOT)
    kinds = [kind] if kind else root.folders()
    folders = [root.at(one, digest) for one in kinds for digest in root.at(one).folders()]
    with ThreadPoolExecutor(READERS) as pool:
        found = [manifest for manifest in pool.map(read_manifest, folders) if manifest is not None]
    found.sort(key=lambda manifest: (manifest.kind, manifest.created_at, manifest.digest))
    return {key_of_ref(manifest): manifest for manifest in found}


def with_ancestors(found: Mapping[Key, Manifest], roots: Iterable[Key]) -> set[Key]:
    """Return the roots and, transitively, all their inputs, as far as these exist."""
    waiting, seen = list(roots), set()
    while waiting:
        key = waiting.pop()
        if key not in seen and key in found:
            seen.add(key)
            waiting += [key_of_ref(ref) for ref in found[key].inputs.values()]
    return seen


def descendants(found: Mapping[Key, Manifest], root: Key) -> set[Key]:
    """Return all artifacts made from this one, directly or not, without itself."""
    users: dict[Key, list[Key]] = {}
    for key, manifest in found.items():
        for ref in manifest.inputs.values():
            users.setdefault(key_of_ref(ref), []).append(key)
    waiting, seen = list(users.get(root, ())), set()
    while waiting:
        key = waiting.pop()
        if key not in seen:
            seen.add(key)
            waiting += users.get(key, ())
    return seen


def pin(store: Store, manifest: Manifest, reason: str = "") -> Pin:
    """Pin an artifact; an existing pin is kept and returned."""
    made = Pin(
        kind=manifest.kind,
        digest=manifest.digest,
        reason=reason,
        pinned_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    name = _pin_name(key_of_ref(manifest))
    if store.create(name, made.model_dump_json(indent=1).encode()):
        return made
    return read_record(store, name, Pin) or made


def unpin(store: Store, manifest: Manifest) -> bool:
    """Remove an artifact's pin; return False if it was not pinned."""
    name = _pin_name(key_of_ref(manifest))
    was_there = store.exists(name)
    store.delete(name)
    return was_there


def pins(store: Store) -> dict[Key, Pin]:
    """Read all pins.

    Raises:
        ValueError: a pin is damaged.
    """
    names = [name for name in store.at(PINS).list() if name.endswith(".json")]
    with ThreadPoolExecutor(READERS) as pool:
        found = [one for one in pool.map(lambda name: read_record(store.at(PINS), name, Pin), names) if one]
    return {(one.kind, one.digest): one for one in found}


def _pin_name(key: Key) -> str:
    return f"{PINS}/{key[0]}-{key[1]}.json"
