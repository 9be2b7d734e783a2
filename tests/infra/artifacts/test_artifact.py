"""The handle on a published artifact: read and verified once, and what it says of its files."""

from collections import Counter

import pytest

from infra.artifacts import manifest, signing
from infra.artifacts.artifact import Artifact
from infra.artifacts.lineage import find_artifact
from infra.artifacts.manifest import MANIFEST, ArtifactPlan, folder_of, publish
from infra.artifacts.shards import put, shard_name, write_shard
from infra.store.store import Store

KEY = "a-key-of-more-than-16-characters"
IMAGES = ArtifactPlan(kind="images", version=1, config={"size": 32})
ROWS = {shard_name("train", 0, 2): 3, shard_name("train", 1, 2): 4, shard_name("val", 0, 1): 2}


def images_in(store: Store, plan: ArtifactPlan = IMAGES) -> Artifact:
    """Publish three shards of two splits, and a file that is not a shard."""
    folder = folder_of(store, plan.kind, plan.digest)
    files = [write_shard(folder, name, name.encode(), rows) for name, rows in ROWS.items()]
    files.append(put(folder, "rejects.parquet", b"none"))
    return Artifact(store, publish(store, plan, files=files, counts={"images": 9}, metrics={}, seconds=1))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count how often each file is read, by its URI."""
    counts: Counter[str] = Counter()
    read = Store.read

    def counting(store: Store, key: str) -> bytes:
        counts[f"{store.uri}/{key}"] += 1
        return read(store, key)

    monkeypatch.setattr(Store, "read", counting)
    return counts


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """List the manifests whose signatures are verified."""
    monkeypatch.setenv(signing.KEY, KEY)
    verified: list[str] = []
    check = signing.check

    def counting(data: bytes, found: str | None, what: str) -> None:
        verified.append(what)
        check(data, found, what)

    monkeypatch.setattr(manifest.signing, "check", counting)
    return verified


def use(images: Artifact) -> None:
    """Read everything that the artifact offers."""
    for split in ("train", "val"):
        assert images.keys(split) == list(images.rows(split))
        assert images.shards(split)
    assert len(list(images.files())) == 4
    assert images.folder.uri == images.uri == images.ref.uri
    assert images.inputs == {}


def test_the_manifest_is_read_and_its_signature_verified_once(
    store: Store, reads: Counter[str], checks: list[str]
) -> None:
    """Guards against a request and an HMAC for every question, as there were."""
    made = images_in(store)
    reads.clear()
    images = Artifact.load(store, made.ref)
    for _ in range(3):
        use(images)
    assert dict(reads) == {f"{made.uri}/{MANIFEST}": 1}
    assert checks == [f"{made.uri}/{MANIFEST}"]
    assert images == made


def test_a_manifest_that_was_changed_is_rejected(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(signing.KEY, KEY)
    images = images_in(store)
    text = images.folder.read(MANIFEST).replace(b'"images": 9', b'"images": 8').replace(b'"images":9', b'"images":8')
    assert text != images.folder.read(MANIFEST)
    images.folder.write(MANIFEST, text)
    for load in (lambda: Artifact.load(store, images.ref), lambda: Artifact.find(store, IMAGES)):
        with pytest.raises(ValueError, match="its signature does not match"):
            load()


def test_rows_and_shards_are_those_of_a_split(store: Store) -> None:
    images = images_in(store)
    train = {name: rows for name, rows in ROWS.items() if name.startswith("train")}
    assert [entry.path for entry in images.shards("train")] == sorted(train)
    assert [entry.path for entry in images.shards()] == sorted(ROWS)
    assert images.rows("train") == {f"{IMAGES.prefix}/{name}": rows for name, rows in train.items()}
    assert images.rows("test") == {}
    assert [images.read(entry).decode() for entry in images.shards("val")] == [shard_name("val", 0, 1)]
    assert {entry.path for entry in images.files()} == {*ROWS, "rejects.parquet"}


def test_pages_are_read_as_one_list(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.artifacts.manifest.PAGE_ENTRIES", 2)
    monkeypatch.setattr("infra.artifacts.pages.PAGE_ENTRIES", 2)
    images = images_in(store)
    assert len(images.manifest.pages) == 2
    assert images.rows("train") == {f"{IMAGES.prefix}/{name}": rows for name, rows in ROWS.items() if "train" in name}
    assert len(images.shards()) == 3
    assert len(list(images.files())) == 4


def test_shards_of_an_earlier_version_are_read_where_they_lie(store: Store) -> None:
    first = images_in(store)
    name = shard_name("train", 0, 2)
    source = first.shards("train")[0].model_copy(update={"source": f"{IMAGES.prefix}/{name}"})
    plan = ArtifactPlan(kind="images", version=2, config={}, inputs={"images": first.ref})
    second = Artifact(store, publish(store, plan, files=[source], counts={}, metrics={}, seconds=1))
    assert second.keys("train") == first.keys("train")[:1]
    assert second.read(second.shards("train")[0]) == name.encode()
    assert second.input("images") == first


def test_a_missing_file_is_named_with_the_remedy(store: Store) -> None:
    images = images_in(store)
    entry = images.shards("val")[0]
    store.delete(images.key(entry))
    with pytest.raises(ValueError, match=rf"{entry.path} is missing; delete {images.uri} and run again"):
        images.read(entry)


def test_what_is_not_finished_is_not_found(store: Store) -> None:
    images = images_in(store)
    assert Artifact.find(store, IMAGES) == images
    images.folder.delete(MANIFEST)
    assert Artifact.find(store, IMAGES) is None
    with pytest.raises(ValueError, match=rf"{images} is no finished artifact in {store.uri}; run the stage"):
        Artifact.load(store, images.ref)


def test_what_a_person_names_is_of_the_kind_that_is_wanted(store: Store) -> None:
    images = images_in(store)
    assert find_artifact(images.uri, None, "codes", "images") == images
    assert find_artifact(images.manifest.digest[:6], store.uri, "images") == images
    with pytest.raises(ValueError, match=rf"^'images/' is no finished artifact in {store.uri}; there are: {images}$"):
        find_artifact("images/", store.uri, "codes", "samples")
    with pytest.raises(ValueError, match=rf"is {images}, where a codes or a samples is wanted"):
        find_artifact(str(images), store.uri, "codes", "samples")
