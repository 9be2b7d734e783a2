"""Groups of shards: the same bytes as one by one, and after a kill only what was in a worker's hands is looked at."""

import functools
import os
import signal
from pathlib import Path

import pytest

from infra.artifacts.manifest import manifest_of, publish, ref_of, shards_of, verify
from infra.compute.workers import map_shards
from infra.store.store import Store
from sftok.coding.encode import FAILED, EncodeJob, EncodeResult, encode
from sftok.coding.groups import Group, GroupEncoder, GroupRecord, Groups, finished_group
from tests.sftok.coding.test_encode import (
    FIRST,
    HERE,
    TWO,
    copied,
    home,
    job_of,
    other_version,
    plan_of,
    ray,
    reference,
    rows_of,
    tamper,
)

__all__ = ["copied", "home", "ray", "reference"]  # fixtures

SIZE = 3  # of 8 shards: two groups of three and one of two


def hashes_of(store: Store, images, made: EncodeResult) -> dict[str, str]:
    manifest = publish(
        store, plan_of(images, store), files=made.files, pages=made.pages, counts=made.counts, metrics={}, seconds=0
    )
    verify(store, manifest)
    again = manifest_of(store, ref_of(store, manifest))
    return {entry.path: entry.sha256 for entry in shards_of(store, again)}


@pytest.mark.usefixtures("ray")
@pytest.mark.parametrize("options", [HERE, TWO], ids=["0", "2"])
def test_the_bytes_are_those_of_shards_one_by_one(copied, reference, options) -> None:
    store, images = copied()
    made = encode(job_of(store, images), images, options=options, group=SIZE)
    assert made.files == []
    assert [page.entries for page in made.pages] == [3, 3, 2]
    assert made.counts == {"shards": 8, "reused": 0, "rows": rows_of(images), "failed": 0}
    assert hashes_of(store, images, made) == reference


def test_a_finished_group_is_one_look(copied, reference, monkeypatch) -> None:
    store, images = copied()
    job = job_of(store, images)
    encode(job, images, options=HERE, group=SIZE)
    job.out.delete("groups/00001-of-00003.json")
    seen: list[str] = []
    read = Store.read
    monkeypatch.setattr(Store, "read", lambda place, key: seen.append(key) or read(place, key))
    made = encode(job, images, options=HERE, group=SIZE)
    assert hashes_of(store, images, made) == reference
    looked = [key for key in seen if key.endswith(".parquet.json")]
    assert len(looked) == 3, "shards of finished groups are looked up"


class DyingEncoder(GroupEncoder):
    """Dies by kill -9 before a group is marked, once for each group."""

    def __init__(self, job: EncodeJob, folder: str) -> None:
        super().__init__(job)
        self.folder = Path(folder)
        Store.create = self._create(Store.create)  # type: ignore[method-assign]

    def _create(self, create):  # type: ignore[no-untyped-def]
        def dying(store: Store, key: str, data: bytes) -> bool:
            mark = self.folder / key.replace("/", "-")
            if key.startswith("groups/") and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return create(store, key, data)

        return dying


@pytest.mark.usefixtures("ray")
def test_kill_9_before_a_group_is_marked_changes_nothing(copied, reference, tmp_path) -> None:
    store, images = copied()
    job = job_of(store, images)
    (tmp_path / "deaths").mkdir()
    groups = Groups(shards_of(store, images), SIZE)
    make = functools.partial(DyingEncoder, job, str(tmp_path / "deaths"))
    records: list[GroupRecord] = map_shards(make, groups, options=TWO)
    assert len(list((tmp_path / "deaths").iterdir())) == 3
    assert [finished_group(job.out, groups.name(number)) for number in range(3)] == records
    assert hashes_of(store, images, encode(job, images, options=HERE, group=SIZE)) == reference


def test_another_version_takes_the_shards_of_groups(copied, reference) -> None:
    store, images = copied()
    encode(job_of(store, images), images, options=HERE, group=SIZE)
    made = encode(other_version(job_of(store, images)), images, options=HERE, group=SIZE)
    assert made.counts["reused"] == 8
    assert made.counts["rows"] == rows_of(images)


def test_one_who_groups_goes_on_from_one_who_did_not(copied, reference) -> None:
    """The size of a group is how a run works, and not what it makes."""
    store, images = copied()
    job = job_of(store, images)
    encode(job, images, options=HERE)
    times = {path: path.stat().st_mtime_ns for path in job.out.path.glob("*.parquet")}
    assert hashes_of(store, images, encode(job, images, options=HERE, group=SIZE)) == reference
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_what_fails_is_listed_once(copied) -> None:
    made = []
    for name, group in (("one", None), ("groups", SIZE)):
        store, images = copied(name)
        tamper(store, images, FIRST)
        made.append(encode(job_of(store, images), images, options=HERE, group=group))
    alone, grouped = made
    assert grouped.counts == alone.counts
    assert alone.counts["failed"] == 2
    assert grouped.files == [file for file in alone.files if file.path == FAILED]


def test_groups_are_made_when_they_are_asked_for(copied) -> None:
    store, images = copied()
    groups = Groups(shards_of(store, images), SIZE)
    assert [len(group.shards) for group in groups] == [3, 3, 2]
    assert isinstance(groups[-1], Group)
    assert [group.name for group in Groups(shards_of(store, images), SIZE, [2, 0])] == [groups.name(2), groups.name(0)]
