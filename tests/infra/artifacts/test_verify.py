"""Parts of verification: bytes in constant memory, keys on disk, shard names, and remote stores."""

import hashlib
import math
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.artifacts.manifest import ArtifactPlan, folder_of, publish
from infra.artifacts.shards import FileEntry, put, shard_name, write_shard
from infra.artifacts.verify import (
    DuplicateIndex,
    Shard,
    bucket_of,
    check_bytes,
    check_shard_names,
    check_sidecar,
    duplicates,
    id_groups,
    local_file,
    locate,
    read_manifest,
    some,
)
from infra.store.store import Store

PLAN = ArtifactPlan(kind="things", version=1, config={})


def test_a_large_file_is_hashed_in_little_memory(store: Store) -> None:
    size = 200 << 20
    folder = store.at("x")
    folder.write("large.bin", b"")
    with (folder.path / "large.bin").open("r+b") as file:
        file.truncate(size)
    sha256, block = hashlib.sha256(), bytes(1 << 20)
    for _ in range(200):
        sha256.update(block)
    seen: list[int] = []
    entry = FileEntry(path="large.bin", size=size, sha256=sha256.hexdigest())
    tracemalloc.start()
    try:
        assert not list(check_bytes(folder.path / "large.bin", entry, seen.append))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 40 << 20
    assert sum(seen) == size
    assert len(seen) > 10, "progress should be seen while it reads"


def test_the_index_finds_duplicates() -> None:
    index = DuplicateIndex()
    index.add("one", ["b", "a", "é", "Z", "a\n", "\U0001f600", "\uffff", "aa"])
    assert list(index.duplicates()) == []
    index.add("two", ["é"])
    index.add("two", ["b", "b"])
    assert list(index.duplicates()) == [("b", ["one", "two"]), ("é", ["one", "two"])]


@given(train=st.integers(1, 40), val=st.integers(1, 40), hashed=st.integers(0, 2**64 - 1))
def test_one_id_of_both_splits_is_in_one_group(train: int, val: int, hashed: int) -> None:
    counts = {"train": train, "val": val}
    shards = [Shard(shard_name(split, i, n), "") for split, n in counts.items() for i in range(n)]
    groups = id_groups(shards, by_hash=True)
    assert sorted(shard for group in groups for shard in group) == sorted(shards)
    assert len(groups) == math.gcd(train, val)
    both = {shard_name("train", hashed % train, train), shard_name("val", hashed % val, val)}
    assert any(both <= {shard.name for shard in group} for group in groups)
    assert id_groups(shards, by_hash=False) == [shards]


def test_groups_are_few_and_still_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a number of groups that is not a divisor: ids would be compared with the wrong shards."""
    monkeypatch.setattr("infra.artifacts.verify.MOST_GROUPS", 4)
    shards = [Shard(shard_name(split, i, n), "") for split, n in (("train", 12), ("val", 6)) for i in range(n)]
    groups = id_groups(shards, by_hash=True)
    assert len(groups) == 3
    for hashed in range(12):
        both = {shard_name("train", hashed, 12), shard_name("val", hashed % 6, 6)}
        assert any(both <= {shard.name for shard in group} for group in groups)


def test_buckets_are_the_published_rule() -> None:
    """SHA-256 of "abc" begins with ba7816bf8f01cfea; other tools may rely on the rule."""
    assert bucket_of("abc", 1 << 64) == 0xBA7816BF8F01CFEA
    assert bucket_of("abc", 1000) == 0xBA7816BF8F01CFEA % 1000


def test_artifacts_are_found_as_people_name_them(store: Store) -> None:
    for number in range(3):
        plan = ArtifactPlan(kind="things", version=1, config={"number": number})
        publish(store, plan, files=[], counts={}, metrics={}, seconds=0)
    digest = PLAN.model_copy(update={"config": {"number": 1}}).digest
    for text in (digest, digest[:9], f"things/{digest[:9]}", f"{store.uri}/artifacts/things/{digest}/manifest.json"):
        assert locate(store, text) == ("things", digest)
    for text in ("", "/", "things/", "others/12", "../things"):
        with pytest.raises(ValueError, match=r"is no finished artifact|key"):
            locate(store, text)


def test_a_damaged_manifest_can_be_located(store: Store) -> None:
    publish(store, PLAN, files=[], counts={}, metrics={}, seconds=0)
    folder_of(store, "things", PLAN.digest).write("manifest.json", b"{")
    assert locate(store, PLAN.digest[:6]) == ("things", PLAN.digest)
    manifest, findings = read_manifest(store, "things", PLAN.digest)
    assert manifest is None
    assert len(findings) == 1


def test_a_sidecar_of_another_file_and_one_that_is_no_json(store: Store) -> None:
    folder = store.at("x")
    name = "train-00000-of-00001.parquet"
    entry = write_shard(folder, name, b"data", 3)
    assert not list(check_sidecar(folder, entry))
    folder.write(f"{name}.json", b"{")
    (finding,) = check_sidecar(folder, entry)
    assert finding.file == f"{name}.json"
    assert ";" not in finding.problem, "two remedies"


def test_shards_are_numbered_without_gaps(store: Store) -> None:
    folder = folder_of(store, PLAN.kind, PLAN.digest)
    names = ["train-00000-of-00003.parquet", "train-00002-of-00003.parquet", "val-00000-of-00001.parquet"]
    manifest = publish(
        store, PLAN, files=[put(folder, name, b"", 0) for name in names], counts={}, metrics={}, seconds=0
    )
    (finding,) = check_shard_names(store, manifest)
    assert finding.file == "train-00001-of-00003.parquet"


def test_few_are_named_and_the_rest_counted() -> None:
    assert some(["d", "b", "a", "c", "e"]) == "'a', 'b', 'c' and 2 more"
    assert duplicates(["a", "b", "a", "a"]) == ["a"]


@pytest.mark.s3
def test_a_store_far_away_is_read_once_to_a_file_that_goes_away(s3_store: Store) -> None:
    folder = s3_store.at("x")
    entry = put(folder, "data.bin", b"data" * 1000)
    with local_file(folder, "data.bin") as path:
        assert not list(check_bytes(path, entry, lambda _: None))
    assert not path.exists()
    with pytest.raises(FileNotFoundError), local_file(folder, "none.bin"):
        pass
