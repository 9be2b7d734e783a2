"""Inventory of a store: list, pin, copy and collect artifacts, with the runs that use them."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from pydantic import JsonValue

from flows.runs.history import PastRun, keys_of, records
from infra.artifacts import inventory
from infra.artifacts.copies import CopyResult, copy_artifact
from infra.artifacts.inventory import Key, Pin, descendants, key_of_ref, manifests, pins, with_ancestors
from infra.artifacts.lineage import resolve
from infra.artifacts.manifest import Manifest, ref_of
from infra.progress import Progress, silent
from infra.store.store import Store

if TYPE_CHECKING:
    from rich.tree import Tree

SHOWN_CHARS = 12  # of the 32 of a digest


class ArtifactListing(NamedTuple):
    """An artifact of a store, as `sftok ls` shows it."""

    manifest: Manifest
    uri: str
    runs: tuple[str, ...]
    pin: Pin | None

    @property
    def stage(self) -> str:
        """Return the stage that made it, if its kind does not tell."""
        return str(self.manifest.config.get("stage", ""))

    def as_json(self) -> dict[str, JsonValue]:
        """Return one flat JSON object."""
        made = self.manifest
        return {
            "ref": f"{made.kind}/{made.digest}",
            "kind": made.kind,
            "stage": self.stage or None,
            "created_at": made.created_at,
            "files": made.num_files,
            "bytes": made.num_bytes,
            "seconds": made.seconds,
            "runs": list(self.runs),
            "pinned": self.pin is not None,
            "uri": self.uri,
        }

    def as_row(self) -> tuple[str, ...]:
        """Return the cells of a table row."""
        made = self.manifest
        last = f"{self.runs[-1]}{f' and {len(self.runs) - 1} more' if len(self.runs) > 1 else ''}" if self.runs else ""
        return (
            f"{made.kind}/{made.digest[:SHOWN_CHARS]}",
            self.stage,
            made.created_at[:16].replace("T", " "),
            f"{made.num_files:,}",
            size_text(made.num_bytes),
            last,
            "pinned" if self.pin else "",
        )


HEAD = ("artifact", "stage", "created", "files", "size", "runs", "")


def list_artifacts(*, store: str | None, kind: str | None = None, run: str | None = None) -> list[ArtifactListing]:
    """List the finished artifacts of a store, optionally of one kind or one run.

    Raises:
        ValueError: there is no such run, or a manifest is damaged.
    """
    place = Store.usual(store)
    found = manifests(place, kind)
    if run is not None:
        wanted = keys_of(records(place, [run]))
        found = {key: manifest for key, manifest in found.items() if key in wanted}
    users, kept = _users(records(place)), pins(place)
    return [
        ArtifactListing(manifest, ref_of(place, manifest).uri, tuple(users.get(key, ())), kept.get(key))
        for key, manifest in found.items()
    ]


def pin(text: str, *, store: str | None, reason: str = "") -> Pin:
    """Pin the artifact that `text` names: collections keep it and all its inputs.

    Raises:
        ValueError: there is no such artifact, or more than one.
    """
    place = Store.usual(store)
    return inventory.pin(place, resolve(place, text), reason)


def unpin(text: str, *, store: str | None) -> str:
    """Unpin the artifact that `text` names.

    Raises:
        ValueError: there is no such artifact, more than one, or it is not pinned.
    """
    place = Store.usual(store)
    manifest = resolve(place, text)
    if not inventory.unpin(place, manifest):
        raise ValueError(f"{manifest.kind}/{manifest.digest} is not pinned; `sftok ls` shows what is")
    return f"{manifest.kind}/{manifest.digest}"


def copy(
    text: str, target: str, *, store: str | None, inputs: bool = False, progress: Progress = silent
) -> list[CopyResult]:
    """Copy the artifact that `text` names into another store, preceded by all its inputs if `inputs`.

    Raises:
        ValueError: there is no such artifact, more than one, a file is damaged, or the target cannot be used.
    """
    place, other = Store.usual(store), Store(target)
    if place == other:
        raise ValueError(f"{place.uri} is the store to copy from: name another one")
    manifest = resolve(place, text)
    found = manifests(place) if inputs else {key_of_ref(manifest): manifest}
    other.check()
    chosen = sorted(
        (found[key] for key in with_ancestors(found, [key_of_ref(manifest)])), key=lambda made: made.created_at
    )
    return [copy_artifact(place, made, other, progress=progress) for made in chosen]


class Dependents(NamedTuple):
    """The artifacts that were made from one, directly or indirectly."""

    found: Mapping[Key, Manifest]
    root: Key

    def as_json(self) -> list[JsonValue]:
        """Return their names, oldest first."""
        keys = descendants(self.found, self.root)
        made = sorted((self.found[key] for key in keys), key=lambda manifest: manifest.created_at)
        return [f"{manifest.kind}/{manifest.digest}" for manifest in made]

    def grow(self, tree: "Tree") -> None:
        """Add them to a tree, each under its inputs; the second occurrence of one is not expanded."""
        self._grow(tree, self.root, set())

    def _grow(self, tree: "Tree", key: Key, seen: set[Key]) -> None:
        for other, manifest in self.found.items():
            if key not in {key_of_ref(ref) for ref in manifest.inputs.values()}:
                continue
            stage = manifest.config.get("stage")
            label = f"{manifest.kind}/{manifest.digest}{f' ({stage})' if stage else ''}"
            if other in seen:
                tree.add(f"{label} (see above)")
                continue
            seen.add(other)
            self._grow(tree.add(label), other, seen)


def size_text(size: float) -> str:
    """Format a number of bytes for people."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"


def _users(runs: Iterable[PastRun]) -> dict[Key, list[str]]:
    users: dict[Key, list[str]] = {}
    for run in runs:
        for key in keys_of([run]):
            users.setdefault(key, []).append(run.run)
    return users
