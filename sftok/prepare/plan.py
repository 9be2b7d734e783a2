"""Assign entries to shards, by hashes of their image ids and never by the order of a listing."""

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
from sftok.prepare.deal import BinResult, Deal, Dealer, Gatherer, unpacked
from sftok.sources.listing import Entries, EntryBatch, Source, batches_of

log = logging.getLogger(__name__)

LARGE_SHARD = 2**30  # bytes
BIN = 2**18  # entries per bin, some 30 MB, and a few times that while they are sorted
MOST_BINS = 4096  # each worker reads a segment of every batch
HERE = WorkerOptions()
_FEW = 8  # batches or bins up to which starting workers does not pay


class ShardJob(NamedTuple):
    """A shard and the place of its entries: a unit of work that is independent of the others."""

    name: str
    split: str
    deal: Deal
    file: str
    start: int
    end: int

    @property
    def entries(self) -> Entries:
        """The entries of the shard, sorted by image id; read at each access."""
        if self.start == self.end:
            return Entries.of(())
        with self.deal.open(self.file) as file:
            file.seek(self.start)
            return unpacked(file.read(self.end - self.start))


class ShardJobs(Sequence[ShardJob]):
    """One job per bucket of each split, empty ones included; made on demand."""

    def __init__(self, deal: Deal, gathered: Sequence[BinResult]) -> None:
        self.deal, self.ends = deal, [result.ends for result in gathered]
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
    class_names: frozenset[str]  # of the entries


def plan_shards(
    source: Source,
    config: DataConfig,
    *,
    folder: Store,
    options: WorkerOptions = HERE,
    progress: Progress = silent,
    bin_size: int | None = None,
) -> ShardPlan:
    """Divide the entries into splits, if the source has none, and into hash buckets.

    Of entries with the same image id the smallest is accepted, and the others are marked as having a problem.

    Args:
        source: already opened, if it consists of containers.
        config: shards and splits.
        folder: parent of the folder of this plan, which the jobs read from.
        options: workers.
        progress: called with batches of a long listing.
        bin_size: entries that a worker should hold, as far as common divisors of the numbers of shards allow.
    """
    batches, found = batches_of(source.entries), len(source.entries)
    bins = _bins(found, config, bin_size or BIN)
    place = folder.at(f"deal-{uuid.uuid4().hex[:12]}")  # two runs may list in different orders
    ways = (True, False) if source.has_names else (False,)
    tried = (_deal(Deal(config, place, bins, by_name), batches, options, progress) for by_name in ways)
    deal, gathered, class_names = next(way for way in tried if way is not None)
    largest = max((result.sizes.max() for result in gathered), default=0)
    if largest > LARGE_SHARD:
        log.warning("a shard of %.1f GB is held in memory while it is written: raise data.num_shards", largest / 1e9)
    return ShardPlan(ShardJobs(deal, gathered), class_names)


def _deal(
    deal: Deal, batches: Sequence[EntryBatch], options: WorkerOptions, progress: Progress
) -> tuple[Deal, list[BinResult], frozenset[str]] | None:
    """Deal all batches and gather all bins; None if preferred names are missing or not unique."""
    report = progress if len(batches) > _FEW else silent
    dealt = map_shards(functools.partial(Dealer, deal), batches, options=_wide(options, len(batches)), progress=report)
    if not all(result.is_named for result in dealt):
        return None
    least = min((result.least for result in dealt if result.least is not None), default=None)
    held_out = None if least is None or any(result.is_held_out for result in dealt) else least[1]
    gather = functools.partial(Gatherer, deal, len(batches), held_out)
    gathered = map_shards(gather, range(deal.bins), options=_wide(options, deal.bins))
    if not all(result.is_unique for result in gathered):
        return None
    return deal, gathered, frozenset().union(*(result.class_names for result in dealt))


def _bins(found: int, config: DataConfig, bin_size: int) -> int:
    """Choose how many bins keep each small: a common divisor of the shard counts, so that bins have whole shards."""
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
