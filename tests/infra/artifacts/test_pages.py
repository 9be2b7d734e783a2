"""Many shards are spread over folders, and listed in pages beside a small manifest."""

import json
from collections import Counter
from typing import Any

import pytest

from infra.artifacts import pages
from infra.artifacts.manifest import (
    ArtifactPlan,
    Manifest,
    files_of,
    find,
    folder_of,
    manifest_of,
    publish,
    ref_of,
    shards_of,
    verify,
)
from infra.artifacts.pages import PagedEntries, read_page, write_page, write_pages
from infra.artifacts.shards import SHARD, SPREAD_FROM, FileEntry, put, shard_name, split_of
from infra.artifacts.verify import read_manifest
from infra.store.store import Store

PLAN = ArtifactPlan(kind="images", version=1, config={})


def entries(count: int, total: int | None = None) -> list[FileEntry]:
    names = [shard_name("train", index, total or count) for index in range(count)]
    return [FileEntry(path=name, size=index, sha256=f"{index:064x}", rows=2) for index, name in enumerate(names)]


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the page size to three entries."""
    for module in ("infra.artifacts.pages", "infra.artifacts.manifest"):
        monkeypatch.setattr(f"{module}.PAGE_ENTRIES", 3)


def published(store: Store, count: int = 8) -> Manifest:
    folder = folder_of(store, PLAN.kind, PLAN.digest)
    files = [put(folder, shard_name("train", index, count), bytes([index]), 1) for index in range(count)]
    files.append(put(folder, "rejects.parquet", b"none", 0))
    return publish(store, PLAN, files=files, counts={}, metrics={}, seconds=0)


class TestNames:
    def test_few_lie_in_one_folder(self) -> None:
        assert shard_name("val", 7, SPREAD_FROM) == f"val-00007-of-{SPREAD_FROM:05d}.parquet"

    def test_many_are_spread_evenly_and_are_still_shards(self) -> None:
        names = [shard_name("train", index, 40_000) for index in range(40_000)]
        folders = Counter(name.partition("/")[0] for name in names)
        assert len(folders) == 256
        assert max(folders.values()) < 2 * min(folders.values())
        assert all(SHARD.fullmatch(name) for name in names)
        assert {split_of(name) for name in names} == {"train"}
        assert len(set(names)) == len(names)

    @pytest.mark.parametrize("name", ["failed.parquet", "xyz/train-00000-of-00001.parquet", "train-0-of-1.parquet"])
    def test_other_files_are_no_shards(self, name: str) -> None:
        assert split_of(name) is None


class TestPages:
    @pytest.mark.usefixtures("small_pages")
    def test_the_sequence_is_that_of_the_entries(self, store: Store) -> None:
        made = entries(8)
        read = PagedEntries(store, write_pages(store, made))
        assert [page.entries for page in read.pages] == [3, 3, 2]
        assert list(read) == [read[index] for index in range(8)] == made
        assert read[2:7] == made[2:7]
        assert (read[-1], len(read)) == (made[-1], 8)
        with pytest.raises(IndexError):
            read[8]

    @pytest.mark.usefixtures("small_pages")
    def test_one_page_at_a_time_is_read_for_neighbours(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        read = PagedEntries(store, write_pages(store, entries(8)))
        seen: list[Any] = []
        monkeypatch.setattr(pages, "read_page", lambda folder, page: seen.append(page) or read_page(folder, page))
        assert [read[index].size for index in range(8)] == list(range(8))
        assert seen == list(read.pages)

    def test_equal_entries_are_one_page_whoever_writes_it(self, store: Store) -> None:
        assert write_page(store, entries(4)) == write_page(store, entries(4))
        assert len(store.list()) == 1

    def test_a_page_that_is_not_what_it_was_is_refused(self, store: Store) -> None:
        page = write_page(store, entries(4))
        good = store.read(page.path)
        store.write(page.path, good.replace(b'"rows":2', b'"rows":3', 1))
        with pytest.raises(ValueError, match="does not match its name's hash; delete"):
            read_page(store, page)
        store.write(page.path, good)
        with pytest.raises(ValueError, match="lists 4 files, the manifest says 5"):
            read_page(store, page.model_copy(update={"entries": 5}))
        store.delete(page.path)
        with pytest.raises(ValueError, match=r"json is missing; delete"):
            read_page(store, page)

    @pytest.mark.parametrize("path", ["../../x", "files/../../secret.json", "files/0.json"])
    def test_a_page_cannot_lie_elsewhere(self, path: str) -> None:
        with pytest.raises(ValueError, match="path"):
            pages.Page(path=path, size=1, entries=1, bytes=1, rows=1)


class TestManifest:
    def test_lists_itself_what_fits(self, store: Store) -> None:
        manifest = published(store)
        assert not manifest.pages
        assert "pages" not in json.loads(store.read(f"{PLAN.prefix}/manifest.json")), "it is no longer as it always was"

    @pytest.mark.usefixtures("small_pages")
    def test_of_many_shards_names_pages(self, store: Store) -> None:
        manifest = published(store)
        assert [entry.path for entry in manifest.files] == ["rejects.parquet"]
        assert len(manifest.pages) == 3
        assert (manifest.num_files, manifest.num_bytes) == (9, 8 + 4)
        again = manifest_of(store, ref_of(store, manifest))
        assert again == manifest
        assert [entry.path for entry in shards_of(store, again)] == [shard_name("train", n, 8) for n in range(8)]
        assert len(list(files_of(store, again))) == 9
        verify(store, again)
        assert read_manifest(store, PLAN.kind, PLAN.digest)[1] == []

    @pytest.mark.usefixtures("small_pages")
    def test_a_second_publisher_gets_the_first_ones(self, store: Store) -> None:
        first = published(store)
        assert published(store) == first == find(store, PLAN)

    @pytest.mark.usefixtures("small_pages")
    def test_a_damaged_page_is_found_before_its_files_are_used(self, store: Store) -> None:
        manifest = published(store)
        store.write(f"{PLAN.prefix}/{manifest.pages[1].path}", b"[]")
        with pytest.raises(ValueError, match="does not match its name's hash"):
            verify(store, manifest)
        (finding,) = read_manifest(store, PLAN.kind, PLAN.digest)[1]
        assert "names a page that cannot be read: files/" in finding.problem

    def test_a_page_that_was_not_written_is_refused(self, store: Store) -> None:
        folder = folder_of(store, PLAN.kind, PLAN.digest)
        page = write_page(folder, entries(2))
        folder.delete(page.path)
        with pytest.raises(ValueError, match="not written: files/"):
            publish(store, PLAN, files=[], pages=[page], counts={}, metrics={}, seconds=0)
        assert find(store, PLAN) is None
