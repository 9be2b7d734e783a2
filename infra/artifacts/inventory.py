"""All artifacts of a store, and what stands on what: from images forward, and from a figure back."""

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
    """Keeps an artifact, and all that it stands on, from being collected."""

    kind: str
    digest: str
    reason: str = Field("", description="why, for those who find it later")
    pinned_at: str = Field(description="ISO 8601, UTC")


def key_of_ref(ref: ArtifactRef | Manifest) -> Key:
    """What identifies an artifact within a store."""
    return ref.kind, ref.digest


def manifests(store: Store, kind: str | None = None) -> dict[Key, Manifest]:
    """Every finished artifact, or those of one kind, by kind and time.

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


def made_of(found: Mapping[Key, Manifest], roots: Iterable[Key]) -> set[Key]:
    """The roots and all that they were made of, as far as it is there."""
    waiting, seen = list(roots), set()
    while waiting:
        key = waiting.pop()
        if key not in seen and key in found:
            seen.add(key)
            waiting += [key_of_ref(ref) for ref in found[key].inputs.values()]
    return seen


def stands_on(found: Mapping[Key, Manifest], root: Key) -> set[Key]:
    """All that was made of an artifact, directly or not; without itself."""
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
    """Keep an artifact; who pinned it first is kept, too."""
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
    """Let an artifact go; False where it was not pinned."""
    name = _pin_name(key_of_ref(manifest))
    was_there = store.exists(name)
    store.delete(name)
    return was_there


def pins(store: Store) -> dict[Key, Pin]:
    """All pins.

    Raises:
        ValueError: one of them is damaged.
    """
    names = [name for name in store.at(PINS).list() if name.endswith(".json")]
    with ThreadPoolExecutor(READERS) as pool:
        found = [one for one in pool.map(lambda name: read_record(store.at(PINS), name, Pin), names) if one]
    return {(one.kind, one.digest): one for one in found}


def _pin_name(key: Key) -> str:
    return f"{PINS}/{key[0]}-{key[1]}.json"
