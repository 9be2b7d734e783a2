"""Groups of shards, the unit of work and of resuming if there are too many shards for one driver.

A finished group has a record, created once and after all of its shards, which names the page of the artifact's manifest
that lists them. So the driver holds groups, a restart looks up groups, and only the shards of groups that were in
progress are looked up one by one, by the worker that gets the group.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, overload

from pydantic import NonNegativeInt

from infra.artifacts.pages import Page, write_page
from infra.artifacts.shards import FileEntry, read_record
from infra.config import Config
from infra.store.store import Store
from sftok.coding.shard import CodeShard, EncodeJob, ShardEncoder, find_shard

FOLDER = "groups"
GROUPS = 32_768  # approximate number: four for each of 8,000 GPUs, and a minute of the driver's time


class Totals(Config):
    """Sums over code shards, and the images that failed."""

    rows: NonNegativeInt
    reused: NonNegativeInt
    failed: tuple[tuple[str, str, str], ...]
    """image id, variant, reason."""


class GroupRecord(Config):
    """The record of a finished group."""

    page: Page
    totals: Totals


class Group(NamedTuple):
    """The image shards of a group."""

    name: str
    shards: list[FileEntry]


class Groups(Sequence[Group]):
    """Consecutive shards, `size` per group, the last of which may be smaller; made on demand."""

    def __init__(self, shards: Sequence[FileEntry], size: int, numbers: Sequence[int] | None = None) -> None:
        """Divide the shards into groups; with `numbers`, only into those."""
        self.shards, self.size, self.total = shards, size, -(-len(shards) // size)
        self.numbers = range(self.total) if numbers is None else numbers

    def name(self, number: int) -> str:
        """Return the path of a group's record in the artifact's folder."""
        return f"{FOLDER}/{number:05d}-of-{self.total:05d}.json"

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> Group: ...
    @overload
    def __getitem__(self, index: slice) -> list[Group]: ...
    def __getitem__(self, index: int | slice) -> Group | list[Group]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        number = self.numbers[index]
        return Group(self.name(number), list(self.shards[number * self.size : (number + 1) * self.size]))


class GroupEncoder:
    """A worker that encodes one group of shards per call."""

    def __init__(self, job: EncodeJob) -> None:
        self.job, self.encode = job, ShardEncoder(job)

    def __call__(self, group: Group) -> GroupRecord:
        """Encode the shards of a group that are neither done nor cached in other versions, and write the record.

        Raises:
            ValueError: an image shard is damaged, or has another number of rows than its entry states.
            TransientError: memory ran out.
        """
        found = [find_shard(self.job, entry) for entry in group.shards]
        missing = [entry for entry, shard in zip(group.shards, found, strict=True) if shard is None]
        encoded = iter(self.encode.several(missing))
        made = [shard or next(encoded) for shard in found]
        page = write_page(self.job.out, [shard.file for shard in made])
        record = GroupRecord(page=page, totals=total_of(self.job, made))
        if self.job.out.create(group.name, record.model_dump_json().encode()):
            return record
        return finished_group(self.job.out, group.name) or record  # another run's: the first one counts


def finished_group(folder: Store, name: str) -> GroupRecord | None:
    """Read the record of a group; None if it is not finished."""
    return read_record(folder, name, GroupRecord)


def total_of(job: EncodeJob, shards: Sequence[CodeShard]) -> Totals:
    """Sum over shards."""
    failed = tuple(
        (image.image_id, variant, image.reason)
        for shard in shards
        for image in shard.failed
        for variant in job.variants_of(shard.file.path)
    )
    reused = sum(shard.file.source is not None for shard in shards)
    return Totals(rows=sum(shard.file.rows or 0 for shard in shards), reused=reused, failed=failed)


def sum_of(totals: Iterable[Totals]) -> Totals:
    """Sum over groups."""
    rows, reused = 0, 0
    failed: list[tuple[str, str, str]] = []
    for total in totals:
        rows, reused = rows + total.rows, reused + total.reused
        failed += total.failed
    return Totals(rows=rows, reused=reused, failed=tuple(failed))
