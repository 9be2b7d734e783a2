"""Which entry goes into which shard: by hashes of its image id, never by the order of a listing."""

import functools
import logging
import uuid
from collections.abc import Sequence
from typing import NamedTuple, overload

from infra.artifacts.shards import common_divisors, shard_name
from infra.compute.workers import WorkerOptions, map_shards
from infra.progress import Progress, silent
from infra.store.store import Store
from sftok.config import DataConfig
from sftok.prepare.deal import Deal, Dealer, Gathered, Gatherer, unpacked
from sftok.sources.listing import Entries, Part, Source, parts_of

log = logging.getLogger(__name__)

LARGE_SHARD = 2**30  # bytes
BIN = 2**18  # entries that a bin should hold, some 30 MB, and a few times that while they are sorted
MOST_BINS = 4096  # each worker reads a segment of every part
HERE = WorkerOptions()
_FEW = 8  # parts or bins that are not worth a worker's start


class ShardJob(NamedTuple):
    """One shard, and where its entries are: a unit of work that needs nothing of the others."""

    name: str
    split: str
    deal: Deal
    file: str
    start: int
    end: int

    @property
    def entries(self) -> Entries:
        """The entries of the shard, by image id: read anew at each call."""
        if self.start == self.end:
            return Entries.of(())
        with self.deal.open(self.file) as file:
            file.seek(self.start)
            return unpacked(file.read(self.end - self.start))


class ShardJobs(Sequence[ShardJob]):
    """One job a bucket of each split, also for empty ones; made when it is asked for."""

    def __init__(self, deal: Deal, gathered: Sequence[Gathered]) -> None:
        self.deal, self.ends = deal, [part.ends for part in gathered]
        self.counts = {"train": deal.config.num_shards, "val": deal.config.num_val_shards}

    def __len__(self) -> int:
        return sum(self.counts.values())

    @overload
    def __getitem__(self, index: int) -> ShardJob: ...
    @overload
    def __getitem__(self, index: slice) -> list[ShardJob]: ...
    def __getitem__(self, index: int | slice) -> ShardJob | list[ShardJob]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        split, at = ("train", at) if at < self.counts["train"] else ("val", at - self.counts["train"])
        number = at % self.deal.bins
        within = at // self.deal.bins + (len(self.deal.shards(number)[0]) if split == "val" else 0)
        start, end = (int(self.ends[number][within - 1]) if within else 0), int(self.ends[number][within])
        name = shard_name(split, at, self.counts[split])
        return ShardJob(name, split, self.deal, self.deal.bin_file(number), start, end)


class ShardPlan(NamedTuple):
    """All jobs of a source."""

    jobs: ShardJobs
    class_names: frozenset[str]  # that entries have


def plan_shards(
    source: Source,
    config: DataConfig,
    *,
    folder: Store,
    options: WorkerOptions = HERE,
    progress: Progress = silent,
    bin_size: int | None = None,
) -> ShardPlan:
    """Divide the entries into splits, where the source has none, and into hash buckets.

    Of entries with one image id the first is taken, by size, and the others have a problem.

    Args:
        source: opened, if it consists of containers.
        config: shards and splits.
        folder: gets a folder for this plan, which the jobs read from.
        options: how wide to run.
        progress: called with parts of a long listing.
        bin_size: entries that a worker should hold, where the numbers of shards have divisors in common for it.
    """
    parts, found = parts_of(source.entries), len(source.entries)
    bins = _bins(found, config, bin_size or BIN)
    place = folder.at(f"deal-{uuid.uuid4().hex[:12]}")  # two runs may list in another order
    ways = (True, False) if source.has_names else (False,)
    tried = (_deal(Deal(config, place, bins, by_name), parts, options, progress) for by_name in ways)
    deal, gathered, class_names = next(way for way in tried if way is not None)
    largest = max((part.sizes.max() for part in gathered), default=0)
    if largest > LARGE_SHARD:
        log.warning("a shard of %.1f GB is held in memory while it is written: raise data.num_shards", largest / 1e9)
    return ShardPlan(ShardJobs(deal, gathered), class_names)


def _deal(
    deal: Deal, parts: Sequence[Part], options: WorkerOptions, progress: Progress
) -> tuple[Deal, list[Gathered], frozenset[str]] | None:
    """Deal all parts and gather all bins; None if entries cannot be called as they would like to be."""
    told = progress if len(parts) > _FEW else silent
    dealt = map_shards(functools.partial(Dealer, deal), parts, options=_wide(options, len(parts)), progress=told)
    if not all(part.is_named for part in dealt):
        return None
    least = min((part.least for part in dealt if part.least is not None), default=None)
    held_out = None if least is None or any(part.is_held_out for part in dealt) else least[1]
    gather = functools.partial(Gatherer, deal, len(parts), held_out)
    gathered = map_shards(gather, range(deal.bins), options=_wide(options, deal.bins))
    if not all(part.is_unique for part in gathered):
        return None
    return deal, gathered, frozenset().union(*(part.class_names for part in dealt))


def _bins(found: int, config: DataConfig, bin_size: int) -> int:
    """As many bins as keep each small: a common divisor of both numbers of shards, so that a bin has whole shards."""
    possible = common_divisors((config.num_shards, config.num_val_shards), MOST_BINS)
    bins = next((number for number in possible if found <= number * bin_size), possible[-1])
    if found > 64 * bins * bin_size:
        log.warning(
            "%d entries are sorted in memory at once: give data.num_shards = %d and data.num_val_shards = %d a larger "
            "common divisor",
            found // bins,
            config.num_shards,
            config.num_val_shards,
        )
    return bins


def _wide(options: WorkerOptions, count: int) -> WorkerOptions:
    return options if count > _FEW else HERE
