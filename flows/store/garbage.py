"""Remove old runs, the artifacts that only they use, and what killed runs left."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from pydantic import JsonValue

from flows.runs.history import PastRun, keys_of, records
from flows.store.inventory import size_text
from infra.artifacts.collect import CollectResult, collect
from infra.artifacts.inventory import Key, manifests, pins, with_ancestors
from infra.artifacts.manifest import Manifest
from infra.store.store import Store


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
    of_some_run = with_ancestors(found, keys_of(runs))
    of_none = [key for key in found if key not in of_some_run]
    needed = kept_keys(found, staying, [*kept, *of_none])
    return Garbage(tuple(sorted(names)), frozenset(with_ancestors(found, keys_of(going)) - needed))


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
    place, now = Store.usual(store), datetime.now(UTC)
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
    return with_ancestors(found, {*keys_of(runs), *kept})
