import dataclasses
import hashlib
import io
import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from infra.compute.workers import WorkerOptions
from infra.errors import TransientError
from infra.store.store import Store
from sftok.config import DataConfig
from sftok.images.contract import METADATA_KEY
from sftok.images.dataset import ImageSet
from sftok.prepare.plan import plan_shards
from sftok.prepare.prepare import REJECTS, PrepareResult, check_reject_rate, prepare
from sftok.sources.listing import Entries, SpooledEntries
from sftok.sources.sources import Entry, FolderReader, Source, list_source

CONFIG = DataConfig(image_size=8, val_fraction=0.25, num_shards=3, num_val_shards=2)
SPLIT_BY_HAND = [f"{split}/{label}/{number}.png" for split in ("train", "val") for label in "ab" for number in range(6)]


def image_bytes(number: int, file_format: str = "PNG", size: tuple[int, int] = (12, 8)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (number % 256, number // 256, 77)).save(file, file_format)
    return file.getvalue()


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def fill(root, paths):
    for number, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(image_bytes(number))
    return root


def folder_of(root, count=40):
    return fill(root, [f"{'abcd'[number % 4]}/{number}.png" for number in range(count)])


def run(root, store: Store, config: DataConfig = CONFIG) -> PrepareResult:
    return prepare(list_source(str(root)), config, out=store)


def rows_of(store: Store, prepared: PrepareResult) -> list[dict]:
    shards = [file.path for file in prepared.files if file.path != REJECTS]
    return [row | {"shard": name} for name in shards for row in pq.read_table(io.BytesIO(store.read(name))).to_pylist()]


def contents(store: Store) -> dict[str, bytes]:
    return {name: store.read(name) for name in store.list()}


def test_every_image_is_kept_as_it_was(data, store):
    prepared = run(fill(data, SPLIT_BY_HAND), store)
    assert prepared.counts == {
        "found": 24,
        "accepted": 24,
        "rejected": 0,
        "left_out": 0,
        "train": 12,
        "val": 12,
        "classes": 2,
    }
    rows = rows_of(store, prepared)
    assert sorted(row["image_id"] for row in rows) == sorted(SPLIT_BY_HAND)
    for row in rows:
        original = (data / row["image_id"]).read_bytes()
        split, label, _ = row["image_id"].split("/")
        assert row["image"] == {"bytes": original, "path": row["image_id"]}
        assert row["sha256"] == hashlib.sha256(original).hexdigest()
        assert (row["width"], row["height"]) == (12, 8)
        assert row["label"] == "ab".index(label)
        assert row["shard"].startswith(f"{split}-")


def test_files_are_described_as_they_are(data, store):
    prepared = run(folder_of(data), store)
    assert [file.path for file in prepared.files] == [
        *(f"train-{index:05d}-of-00003.parquet" for index in range(3)),
        *(f"val-{index:05d}-of-00002.parquet" for index in range(2)),
        "rejects.parquet",
    ]
    for file in prepared.files:
        data = store.read(file.path)
        assert (file.size, file.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        assert file.rows == pq.read_metadata(io.BytesIO(data)).num_rows
    for name in store.list():
        if name.endswith(".parquet") and name != REJECTS:
            table = pq.read_table(io.BytesIO(store.read(name)))
            assert table["image_id"].to_pylist() == sorted(table["image_id"].to_pylist())
            assert json.loads(table.schema.metadata[METADATA_KEY])["class_names"] == ["a", "b", "c", "d"]


def test_bad_files_are_counted_and_told(data, store):
    folder_of(data)
    (data / "a/text.png").write_text("no image")
    (data / "b/empty.jpg").write_bytes(b"")
    (data / "c/half.jpg").write_bytes(image_bytes(1, "JPEG", (100, 90))[:-20])
    (data / "d/large.png").write_bytes(image_bytes(1, size=(101, 100)))
    (data / "d/gone.png").symlink_to("nowhere")
    (data / "d/dir.png").mkdir()
    (data / "loose.png").write_bytes(image_bytes(1))
    (data / "a/no suffix, still an image").write_bytes(image_bytes(3, "WEBP"))
    prepared = run(data, store, CONFIG.model_copy(update={"max_pixels": 10_099}))
    assert prepared.counts["found"] == 48
    assert prepared.counts["accepted"] == 41
    assert prepared.counts["rejected"] == 7
    rejects = pq.read_table(io.BytesIO(store.read(REJECTS))).to_pylist()
    assert [(row["path"], row["size"] > 0) for row in rejects] == [
        ("a/text.png", True),
        ("b/empty.jpg", False),
        ("c/half.jpg", True),
        ("d/dir.png", False),
        ("d/gone.png", False),
        ("d/large.png", True),
        ("loose.png", True),
    ]
    reasons = {row["path"]: row["reason"] for row in rejects}
    assert reasons["b/empty.jpg"] == "empty file"
    assert reasons["d/large.png"] == "101 x 100 is more than max_pixels = 10099"
    assert "truncated" in reasons["c/half.jpg"]
    assert {"a/no suffix, still an image", "a/0.png"} <= {row["image_id"] for row in rows_of(store, prepared)}


def test_rejects_parquet_has_its_columns_without_rejects_too(data, store):
    run(folder_of(data), store)
    table = pq.read_table(io.BytesIO(store.read(REJECTS)))
    assert {field.name: str(field.type) for field in table.schema} == {
        "path": "string",
        "reason": "string",
        "size": "int64",
    }


def test_same_images_make_the_same_bytes_in_any_order(tmp_path):
    source = list_source(str(folder_of(tmp_path / "data")))
    shuffled = list(source.entries)
    random.Random(0).shuffle(shuffled)
    one, other = Store(tmp_path / "one"), Store(tmp_path / "other")
    first = prepare(source, CONFIG, out=one)
    second = prepare(dataclasses.replace(source, entries=tuple(shuffled)), CONFIG, out=other)
    assert first == second
    assert contents(one) == contents(other)


def test_touched_and_moved_images_have_the_same_content_digest(tmp_path):
    before = run(folder_of(tmp_path / "data"), Store(tmp_path / "one"))
    (tmp_path / "data").rename(tmp_path / "moved")
    for path in (tmp_path / "moved").rglob("*.png"):
        os.utime(path, ns=(1, 1))
    assert run(tmp_path / "moved", Store(tmp_path / "two")) == before


def test_content_digest_tells_bytes_ids_labels_and_splits(tmp_path):
    def digest(change) -> str:
        root = fill(tmp_path / f"{change}/data", SPLIT_BY_HAND)
        if change == "bytes":
            (root / "train/a/0.png").write_bytes(image_bytes(999))
        elif change == "id":
            (root / "train/a/0.png").rename(root / "train/a/00.png")
        elif change == "class name":
            (root / "train/b").rename(root / "train/c")
            (root / "val/b").rename(root / "val/c")
        elif change == "one more":
            (root / "val/b/9.png").write_bytes(image_bytes(5))
        return run(root, Store(tmp_path / f"{change}/store")).content_digest

    changes = ("none", "bytes", "id", "class name", "one more")
    assert len({digest(change) for change in changes}) == len(changes)


def test_content_digest_tells_the_split(tmp_path):
    source = list_source(str(folder_of(tmp_path / "data")))

    def with_split(start: int) -> PrepareResult:
        entries = (
            entry._replace(split="val" if number < 8 else "train") for number, entry in enumerate(source.entries, start)
        )
        return prepare(dataclasses.replace(source, entries=tuple(entries)), CONFIG, out=Store(tmp_path / f"{start}"))

    assert with_split(0).content_digest != with_split(1).content_digest


def test_content_digest_does_not_depend_on_the_number_of_shards(tmp_path):
    root = folder_of(tmp_path / "data")
    other = CONFIG.model_copy(update={"num_shards": 7, "num_val_shards": 1})
    assert run(root, Store(tmp_path / "a")).content_digest == run(root, Store(tmp_path / "b"), other).content_digest


def test_one_more_image_touches_one_shard(tmp_path):
    root = folder_of(tmp_path / "data")
    run(root, Store(tmp_path / "one"))
    (root / "a/more.png").write_bytes(image_bytes(7))
    run(root, Store(tmp_path / "two"))
    before, after = contents(Store(tmp_path / "one")), contents(Store(tmp_path / "two"))
    changed = {name for name in after if name.endswith(".parquet") and before[name] != after[name]}
    assert len(changed) == 1


def entries_of(count: int, split: str | None = None) -> Source:
    entries = tuple(Entry(f"a/{number}.png", 1, "1", "a", split) for number in range(count))
    return Source("made up", entries, ("a",), FolderReader("/nowhere"))


def test_the_hash_split_holds_out_its_fraction_for_good(store):
    def held_out(count: int, **changes: object) -> set[str]:
        jobs = plan_shards(entries_of(count), CONFIG.model_copy(update=changes), folder=store).jobs
        return {entry.image_id for job in jobs if job.split == "val" for entry in job.entries}

    first = held_out(4000)
    assert 900 < len(first) < 1100
    assert held_out(8000) >= first, "an image must not change its split when others come"
    assert held_out(4000, num_shards=17, num_val_shards=1) == first
    assert held_out(4000, val_fraction=0.5) > first
    # known values: another hash would move every image of every dataset
    assert held_out(12) == {"a/1.png", "a/2.png", "a/5.png"}


def test_buckets_are_balanced_and_independent_of_the_split(store):
    sizes = {split: [] for split in ("train", "val")}
    config = CONFIG.model_copy(update={"num_shards": 4, "num_val_shards": 4})
    for job in plan_shards(entries_of(8000), config, folder=store).jobs:
        sizes[job.split].append(len(job.entries))
    assert all(1300 < size < 1700 for size in sizes["train"])
    assert all(400 < size < 600 for size in sizes["val"])


def test_shards_too_large_for_memory_are_told(store, caplog):
    source = entries_of(100)
    large = tuple(entry._replace(size=2**26) for entry in source.entries)  # 6.4 GB in 3 shards
    plan_shards(source, CONFIG, folder=store)
    assert not caplog.text
    plan_shards(dataclasses.replace(source, entries=large), CONFIG, folder=store)
    assert "raise data.num_shards" in caplog.text


@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_handful_of_images_still_holds_one_out(data, store, count):
    root = fill(data, [f"a/{number}.png" for number in range(count)])
    prepared = run(root, store, CONFIG.model_copy(update={"val_fraction": 0.001}))
    assert (prepared.counts["train"], prepared.counts["val"]) == (count - 1, 1)


def test_a_class_without_a_usable_image_is_refused(data, store):
    fill(data, SPLIT_BY_HAND)
    for number in range(6):
        (data / f"train/b/{number}.png").write_text("no image")
    with pytest.raises(
        ValueError, match=r"class 'b' has no usable image in train \(rejected: 'train/b/0.png', not an image"
    ):
        run(data, store)


def test_a_split_without_a_usable_image_is_refused(data, store):
    fill(data, ["train/a/1.png", "val/a/1.png"])
    (data / "val/a/1.png").write_bytes(b"")
    with pytest.raises(ValueError, match="no usable image in val"):
        run(data, store)


def test_of_two_entries_with_one_id_one_is_taken(data, store):
    source = list_source(str(folder_of(data)))
    again = source.entries[0]._replace(split="val"), source.entries[1]._replace(split="train")
    prepared = prepare(dataclasses.replace(source, entries=(*source.entries, *again)), CONFIG, out=store)
    assert (prepared.counts["found"], prepared.counts["accepted"]) == (42, 40)
    rejects = pq.read_table(io.BytesIO(store.read(REJECTS))).to_pylist()
    assert [(row["path"], row["reason"]) for row in rejects] == [
        (entry.image_id, "another entry has the same name") for entry in again
    ]


def test_a_killed_run_reads_only_what_was_unfinished(tmp_path):
    root = folder_of(tmp_path / "data")
    (root / "a/text.png").write_text("no image")
    (root / "b/text.png").write_text("no image either")
    source = list_source(str(root))
    whole = Store(tmp_path / "whole")
    expected = prepare(source, CONFIG, out=whole)
    jobs = plan_shards(source, CONFIG, folder=Store(tmp_path / "plan")).jobs

    class Killed(BaseException):
        pass

    read: list[str] = []

    def read_until_killed(entry: Entry) -> bytes:
        if entry in jobs[1].entries:
            raise Killed
        return source.read(entry)

    def recorded(entry: Entry) -> bytes:
        read.append(entry.image_id)
        return source.read(entry)

    store = Store(tmp_path / "store")
    with pytest.raises(Killed):
        prepare(dataclasses.replace(source, read=read_until_killed), CONFIG, out=store)
    assert prepare(dataclasses.replace(source, read=recorded), CONFIG, out=store) == expected
    assert contents(store) == contents(whole)
    assert not set(read) & {entry.image_id for entry in jobs[0].entries}
    assert read


def test_an_error_of_the_storage_is_not_a_rejected_image(data, store):
    def fail(entry: Entry) -> bytes:
        raise OSError(5, "Input/output error")

    source = dataclasses.replace(list_source(str(folder_of(data))), read=fail)
    with pytest.raises(OSError, match="Input/output"):
        prepare(source, CONFIG, out=store)


def test_names_of_any_kind_come_back(data, store):
    names = [
        "ü 日本 🦆.png",
        "'\"`.png",
        "a\nb.png",
        "<b>&amp;</b>.png",
        "a\\b.png",
        ",;\t.png",
        "é.png",
        "e\u0301.png",
    ]
    paths = [f"{split}/<i>a, b'\n\"/{name}" for split in ("train", "val") for name in names]
    prepared = run(fill(data, paths), store)
    assert prepared.counts["accepted"] == len(paths)
    assert sorted(row["image_id"] for row in rows_of(store, prepared)) == sorted(paths)


def test_progress_ends_at_the_total(data, store):
    calls = []
    source = list_source(str(folder_of(data)))
    prepare(source, CONFIG, out=store, progress=lambda done, total, _: calls.append((done, total)))
    assert calls[-1] == (40, 40)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_unlabelled_entries_have_null_labels(data, store):
    root = fill(data, [f"{number}.png" for number in range(8)])
    entries = tuple(Entry(path.name, path.stat().st_size, "1") for path in sorted(root.iterdir()))
    prepared = prepare(Source("made up", entries, None, FolderReader(str(root))), CONFIG, out=store)
    assert {row["label"] for row in rows_of(store, prepared)} == {None}
    assert prepared.counts["classes"] == 0


@pytest.fixture
def prepared_path(tmp_path):
    store = Store(tmp_path / "store")
    run(folder_of(tmp_path / "data"), store)
    return tmp_path / "store"


def test_hugging_face_sees_images_and_classes(prepared_path, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    files = {split: sorted(map(str, prepared_path.glob(f"{split}-*.parquet"))) for split in ("train", "val")}
    loaded = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))
    assert loaded["train"].num_rows + loaded["val"].num_rows == 40
    for split in loaded.values():
        assert isinstance(split.features["image"], datasets.Image)
        assert split.features["label"].names == ["a", "b", "c", "d"]
    row = loaded["train"][0]
    assert isinstance(row["image"], Image.Image)
    assert row["image"].size == (12, 8)
    number = int(row["image_id"].split("/")[1].removesuffix(".png"))
    assert row["image"].getpixel((0, 0)) == (number, 0, 77)
    assert loaded["train"].features["label"].int2str(row["label"]) == row["image_id"][0]


def test_image_parquet_opens_in_duckdb_and_pandas(prepared_path):
    files = str(prepared_path / "train-*.parquet")
    count = duckdb.sql(
        f"select label, count(*) n, min(octet_length(image.bytes)) b from '{files}' group by 1 order by 1"
    ).fetchall()
    assert [label for label, *_ in count] == [0, 1, 2, 3]
    assert all(length > 50 for *_, length in count)
    frame = pd.concat(pd.read_parquet(path) for path in sorted(prepared_path.glob("train-*.parquet")))
    assert len(frame) == sum(n for _, n, _ in count)
    assert Image.open(io.BytesIO(frame.iloc[0]["image"]["bytes"])).size == (12, 8)


def test_preparing_loads_no_torch():
    # Its import takes each worker seconds, and the command line waits for it.
    script = "import sys, sftok.prepare.prepare, sftok.sources.sources; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_a_job_is_a_few_bytes_whatever_the_shard_holds(store):
    config = CONFIG.model_copy(update={"num_shards": 2, "num_val_shards": 1})
    jobs = plan_shards(entries_of(20_000), config, folder=store).jobs
    assert max(len(pickle.dumps(job)) for job in jobs) < 1_000
    assert sum(len(job.entries) for job in jobs) == 20_000


# --- long listings


def entries_by_shard(source: Source, config: DataConfig, folder: Store, **options: object) -> dict[str, list[Entry]]:
    return {job.name: list(job.entries) for job in plan_shards(source, config, folder=folder, **options).jobs}


@pytest.mark.parametrize(
    ("train", "val", "bins", "workers"),
    [(12, 8, 4, 0), (60, 30, 30, 0), pytest.param(60, 30, 30, 2, marks=pytest.mark.slow), (7, 5, 1, 0), (6, 6, 6, 0)],
)
def test_bins_change_no_shard(store, monkeypatch, train, val, bins, workers):
    config = CONFIG.model_copy(update={"num_shards": train, "num_val_shards": val})
    source = entries_of(3000)
    mixed = [entry._replace(split=(None, "train", "val")[n % 3]) for n, entry in enumerate(source.entries)]
    source = dataclasses.replace(source, entries=(*mixed, *(entry._replace(size=9) for entry in mixed[::100])))
    at_once = entries_by_shard(source, config, store.at("one"))
    monkeypatch.setattr("sftok.sources.listing._BATCH", 211)
    options = WorkerOptions(workers=workers, cpus_per_worker=0.1)
    dealt = entries_by_shard(source, config, store.at("other"), options=options, bin_size=1)
    assert dealt == at_once
    assert len([name for name in store.at("other").list() if "/bin-" in name]) == bins
    assert len([name for name in store.at("other").list() if "/part-" in name]) == -(-3030 // 211)
    assert sum(entry.problem is not None for entries in dealt.values() for entry in entries) == 30


def test_one_image_of_few_is_held_out_across_bins(store, monkeypatch):
    config = CONFIG.model_copy(update={"num_shards": 8, "num_val_shards": 8, "val_fraction": 1e-6})
    at_once = entries_by_shard(entries_of(50), config, store.at("one"))
    monkeypatch.setattr("sftok.sources.listing._BATCH", 7)
    assert entries_by_shard(entries_of(50), config, store.at("other"), bin_size=1) == at_once
    assert sum(len(entries) for name, entries in at_once.items() if name.startswith("val")) == 1


def test_a_long_listing_is_kept_in_a_file_and_is_the_same(tmp_path, monkeypatch):
    for name in ("a", "a b", "a-", "a.png", "b"):
        fill(tmp_path / "data", [f"{name}/{number}.png" for number in range(9)])
    short = list_source(str(tmp_path / "data"))
    assert isinstance(short.entries, Entries)
    expected = prepare(short, CONFIG, out=Store(tmp_path / "short"))
    monkeypatch.setattr("sftok.sources.listing.SPOOL_FROM", 10)
    monkeypatch.setattr("sftok.sources.listing._BATCH", 4)
    long = list_source(str(tmp_path / "data"))
    assert isinstance(long.entries, SpooledEntries)
    assert (list(long.entries), long.digest, long.class_names) == (list(short.entries), short.digest, short.class_names)
    assert (len(long.entries), long.entries[7], list(long.entries[3:6])) == (
        45,
        short.entries[7],
        list(short.entries[3:6]),
    )
    assert prepare(long, CONFIG, out=Store(tmp_path / "long")) == expected
    assert contents(Store(tmp_path / "long")) == contents(Store(tmp_path / "short"))


def test_shard_numbers_without_a_common_divisor_are_told_for_many_images(store, caplog):
    config = CONFIG.model_copy(update={"num_shards": 7, "num_val_shards": 2})
    plan_shards(entries_of(65), config, folder=store, bin_size=1)
    assert "give data.num_shards = 7 and data.num_val_shards = 2 a larger common divisor" in caplog.text


def test_images_that_were_prepared_under_a_higher_rate_are_held_against_todays():
    """Guards against a rotten source that is found done once it was let through."""
    counts = {"found": 2000, "rejected": 100}
    config = DataConfig(image_size=8)
    with pytest.raises(ValueError, match=r"images/1: 100 of 2,000 entries were rejected, a share of 0\.05"):
        check_reject_rate(counts, config, "images/1")
    check_reject_rate(counts, config.model_copy(update={"max_reject_rate": 0.05}), "images/1")
    check_reject_rate(
        {"found": 999, "rejected": 900}, config, "images/1"
    )  # small sources are for their owners to judge


def test_a_plan_whose_files_are_gone_is_made_again(store):
    """Another run of the same source has finished and cleared up: the next attempt finds its images."""
    jobs = plan_shards(entries_of(9), CONFIG, folder=store).jobs
    jobs.deal.folder.delete_tree()
    with pytest.raises(TransientError, match="another run prepared the same images"):
        [job.entries for job in jobs]


# --- resized once ----------------------------------------------------------------------------------------------------


def shapes(root: Path) -> Path:
    """Images of all shapes, one longer than 4:1, one upright only by its metadata, one broken."""
    for number, (width, height) in enumerate(
        [(40, 30), (30, 41), (8, 8), (5, 6), (90, 9), (9, 90), (33, 32), (17, 64)]
    ):
        path = root / "ab"[number % 2] / f"{number:02d}.{'jpg' if number % 3 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        turned = Image.Exif()
        turned[0x0112] = 6
        Image.fromarray(pixels).save(path, **({"exif": turned} if number == 1 else {}))
    (root / "a" / "broken.jpg").write_bytes(b"\xff\xd8 no image")
    return root


@pytest.mark.parametrize("name", ["webp", "ppm"])
def test_images_that_are_resized_once_are_those_that_are_resized_each_time(tmp_path: Path, name: str) -> None:
    root = shapes(tmp_path / "data")
    once = CONFIG.model_copy(update={"store_size": CONFIG.image_size, "store_format": name})
    folders, made = {}, {}
    for way, config in (("each time", CONFIG), ("once", once)):
        folders[way] = Store(tmp_path / way)
        made[way] = run(root, folders[way], config)
    assert made["once"].counts == made["each time"].counts
    assert made["once"].counts["rejected"] == 1
    assert made["once"].content_digest != made["each time"].content_digest
    for split in ("train", "val"):
        wanted, found = (ImageSet.open(folder).load(split, CONFIG.image_size) for folder in folders.values())
        assert found.image_ids == wanted.image_ids
        assert torch.equal(found.images, wanted.images)
        assert torch.equal(found.class_ids, wanted.class_ids)
    for shard in ImageSet.open(folders["once"]).names:
        for row in pq.read_table(folders["once"].path / shard).to_pylist():
            assert min(row["width"], row["height"]) == CONFIG.image_size
            assert max(row["width"], row["height"]) <= 4 * CONFIG.image_size
            assert row["sha256"] == hashlib.sha256(row["image"]["bytes"]).hexdigest()


def test_resizing_once_is_part_of_what_images_are_and_not_resizing_is_not() -> None:
    assert not {"store_size", "store_format"} & set(CONFIG.identity())
    resized = DataConfig(image_size=8, store_size=9, store_format="ppm")
    assert (resized.identity()["store_size"], resized.identity()["store_format"]) == (9, "ppm")
    with pytest.raises(ValueError, match="store_size = 7 is below image_size = 8: set at least as much, or 0"):
        DataConfig(image_size=8, store_size=7)
    with pytest.raises(ValueError, match="store_format = ppm has no effect without store_size: set store_size"):
        DataConfig(image_size=8, store_format="ppm")
