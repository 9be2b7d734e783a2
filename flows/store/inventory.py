"""Inventory of a store: list, pin, copy and collect artifacts, with the runs that use them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, NamedTuple

from pydantic import JsonValue

from flows.runs.history import PastRun, records
from infra.artifacts import inventory
from infra.artifacts.collect import CollectResult, collect
from infra.artifacts.copies import CopyResult, copy_artifact
from infra.artifacts.inventory import Key, Pin, descendants, key_of_ref, manifests, pins, with_ancestors
from infra.artifacts.lineage import resolve
from infra.artifacts.manifest import Manifest, ref_of
from infra.progress import Progress, silent
from infra.settings import Settings
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
    place = Store(store or Settings().store)
    found = manifests(place, kind)
    if run is not None:
        wanted = _of_runs(records(place, [run]))
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
    place = Store(store or Settings().store)
    return inventory.pin(place, resolve(place, text), reason)


def unpin(text: str, *, store: str | None) -> str:
    """Unpin the artifact that `text` names.

    Raises:
        ValueError: there is no such artifact, more than one, or it is not pinned.
    """
    place = Store(store or Settings().store)
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
    place, other = Store(store or Settings().store), Store(target)
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


class Garbage(NamedTuple):
    """Runs that can be removed, and artifacts that only they use."""

    runs: tuple[str, ...]
    artifacts: frozenset[Key]


def find_garbage(
    found: Mapping[Key, Manifest], runs: Sequence[PastRun], kept: Iterable[Key], *, keep_last: int, before: str
) -> Garbage:
    """Find old runs beyond the last few of their recipe, and the artifacts that only they use.

    Kept are artifacts of kept or running runs with their inputs, pins, and what no run made, such as imported weights.

    Args:
        found: all finished artifacts.
        runs: all runs, oldest first.
        kept: pins.
        keep_last: runs of each recipe that are kept, however old.
        before: runs that started after this time are kept; ISO 8601, UTC.
    """
    going: list[PastRun] = []
    for recipe in {run.recipe.name for run in runs}:
        ended = [run for run in runs if run.recipe.name == recipe and run.state != "Running"]
        going += [run for run in ended[: max(0, len(ended) - keep_last)] if run.started_at < before]
    names = {run.run for run in going}
    staying = [run for run in runs if run.run not in names]
    of_some_run = with_ancestors(found, _of_runs(runs))
    of_none = [key for key in found if key not in of_some_run]
    needed = kept_keys(found, staying, [*kept, *of_none])
    return Garbage(tuple(sorted(names)), frozenset(with_ancestors(found, _of_runs(going)) - needed))


class CollectionResult(NamedTuple):
    """What a garbage collection removed, or would remove."""

    dry_run: bool
    runs: tuple[str, ...]
    collected: CollectResult

    def as_json(self) -> dict[str, JsonValue]:
        """Return one flat JSON object."""
        collected = {
            name: list(value) if isinstance(value, tuple) else value for name, value in self.collected._asdict().items()
        }
        return {"dry_run": self.dry_run, "runs": list(self.runs), **collected}

    def lines(self) -> Iterator[str]:
        """Yield the lines that people read."""
        verb = "would remove" if self.dry_run else "removed"
        for what, names in (
            ("run", self.runs),
            ("artifact", self.collected.artifacts),
            ("leftover", self.collected.leftovers),
        ):
            yield from (f"{what:<9} {name}" for name in names)
        made = self.collected
        yield (
            f"{verb}: {len(self.runs)} runs, {len(made.artifacts)} artifacts, {len(made.leftovers)} leftovers, "
            f"{made.uploads} unfinished uploads; {made.files:,} files, {size_text(made.bytes)}"
            + (f"; {made.shared:,} files are kept for datasets that share them" if made.shared else "")
        )


def collect_garbage(
    *, store: str | None, keep_last: int, older_than: timedelta, grace: timedelta, dry_run: bool
) -> CollectionResult:
    """Remove old runs, artifacts that only they use, and leftovers of killed runs.

    Raises:
        ValueError: a manifest or a pin is damaged: its inputs are unknown, so nothing is removed.
    """
    place, now = Store(store or Settings().store), datetime.now(UTC)
    found = manifests(place)
    garbage = find_garbage(
        found, records(place), pins(place), keep_last=keep_last, before=(now - older_than).isoformat()
    )
    collected = collect(place, found, garbage.artifacts, before=(now - grace).timestamp(), dry_run=dry_run)
    for name in () if dry_run else garbage.runs:
        place.at("runs", name).delete_tree()
    return CollectionResult(dry_run, garbage.runs, collected)


def kept_keys(found: Mapping[Key, Manifest], runs: Iterable[PastRun], kept: Iterable[Key]) -> set[Key]:
    """Return the artifacts that runs and pins keep: theirs, and all inputs of those."""
    return with_ancestors(found, {*_of_runs(runs), *kept})


def size_text(size: float) -> str:
    """Format a number of bytes for people."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"


def _of_runs(runs: Iterable[PastRun]) -> set[Key]:
    return {key_of_ref(stage.ref) for run in runs for stage in run.stages.values() if stage.ref is not None}


def _users(runs: Iterable[PastRun]) -> dict[Key, list[str]]:
    users: dict[Key, list[str]] = {}
    for run in runs:
        for key in _of_runs([run]):
            users.setdefault(key, []).append(run.run)
    return users
