"""Groups of shards: the same bytes as one by one, and only the shards of unfinished groups are looked at."""

from infra.artifacts.manifest import manifest_of, publish, ref_of, shards_of, verify
from infra.store.store import Store
from sftok.coding.encode import FAILED, EncodeResult, encode
from sftok.coding.groups import Group, Groups
from tests.sftok.coding.test_encode import (
    FIRST,
    HERE,
    copied,
    home,
    job_of,
    other_version,
    plan_of,
    reference,
    rows_of,
    tamper,
)

__all__ = ["copied", "home", "reference"]  # fixtures

SIZE = 3  # of 8 shards: two groups of three and one of two


def hashes_of(store: Store, images, made: EncodeResult) -> dict[str, str]:
    manifest = publish(
        store, plan_of(images, store), files=made.files, pages=made.pages, counts=made.counts, metrics={}, seconds=0
    )
    verify(store, manifest)
    again = manifest_of(store, ref_of(store, manifest))
    return {entry.path: entry.sha256 for entry in shards_of(store, again)}


def assert_groups(store: Store, images, made: EncodeResult, reference: dict[str, str]) -> None:
    """Three groups, of the bytes that shards one by one have."""
    assert made.files == []
    assert [page.entries for page in made.pages] == [3, 3, 2]
    assert made.counts == {"shards": 8, "reused": 0, "rows": rows_of(images), "failed": 0}
    assert hashes_of(store, images, made) == reference


def test_the_bytes_are_those_of_shards_one_by_one(copied, reference) -> None:
    store, images = copied()
    assert_groups(store, images, encode(job_of(store, images), images, options=HERE, group=SIZE), reference)


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
