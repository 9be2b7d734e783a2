"""Every kind of source makes the same shards on disk and on S3, with any number of workers, killed or not."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from infra.compute.cluster import session
from infra.compute.workers import WorkerOptions
from infra.errors import TransientError
from infra.store.s3 import Bucket
from infra.store.store import Store
from sftok.images.preprocess import to_rgb
from sftok.prepare import prepare as prepare_module
from sftok.prepare.prepare import PrepareResult, prepare
from sftok.sources import files as source_files
from sftok.sources.listing import Entries
from sftok.sources.parquet import ParquetUnpacker
from sftok.sources.sources import Entry, FolderReader, Source, list_source
from tests.sftok.images.test_preprocess import BROKEN, ODD
from tests.support.image_sources import (
    CONFIG,
    contents,
    hf_parquet,
    hf_schema,
    image_bytes,
    reasons,
    rows_of,
    samples,
    tar_bytes,
    upload,
    write_files,
)
from tests.support.s3_server import S3Server

KINDS = ("folder", "webdataset", "parquet", "index")
# No backslash: the S3 server of the tests takes it for a slash.
ODD_NAMES = ("ü 日本 🦆", "'\"`", "a\nb\r", "<b>&amp;</b>", "%2e%2e +?#=", "~", "é", "e\u0301", "{0..3}*[x]")


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    with session(num_cpus=2):
        yield


def make(kind: str, root: Path) -> str:
    """Forty images and a few that are none; the name of the source within `root`."""
    if kind == "webdataset":
        parts = {f"{n:05d}.tar": tar_bytes(samples(range(n * 10, n * 10 + 10))) for n in range(4)}
        odd = tar_bytes([("../x.png", image_bytes(0)), ("bad.png", b"text"), ("bad.cls", b"0"), ("n.png", b"")])
        write_files(root, parts | {"odd.tar": odd, "damaged.tar": parts["00001.tar"][:3000]})
        return ""
    if kind == "parquet":
        for part in range(4):
            hf_parquet(root / f"data/train-{part:05d}.parquet", range(part * 10, part * 10 + 10), ["a", "b"])
        rows = [{"image": {"bytes": data, "path": f"odd{n}.png"}, "label": 0} for n, data in enumerate((b"", b"text"))]
        pq.write_table(pa.Table.from_pylist(rows, schema=hf_schema(["a", "b"])), root / "data/train-odd.parquet")
        return ""
    images = {f"{'ab'[n % 2]}/{ODD_NAMES[n % 9]}{n}.png": image_bytes(n) for n in range(40)}
    bad = {"a/bad.png": b"text", "b/empty.png": b"", "a/folder.png/inside.jpg": image_bytes(7, "JPEG")}
    write_files(root, images | bad | {"a/.DS_Store": b"litter", "b/._x.png": b"litter"})
    if kind == "index":
        table = pa.table({"path": sorted(images | bad), "label": [path[0] for path in sorted(images | bad)]})
        pq.write_table(table, root / "index.parquet")
        return "/index.parquet"
    return ""


def run(uri: str, store: Store, workers: int = 0) -> PrepareResult:
    return prepare(list_source(uri), CONFIG, out=store, options=WorkerOptions(workers=workers))


@pytest.mark.s3
@pytest.mark.parametrize("kind", KINDS)
def test_disk_and_s3_make_the_same_files(kind, tmp_path, store, s3_store):
    name = make(kind, tmp_path / "data")
    remote = f"{upload(tmp_path / 'data')}{name}"
    local = run(f"{tmp_path}/data{name}", store)
    assert local.counts["accepted"] >= 40
    assert local.counts["rejected"] >= 2
    assert local.counts["found"] == local.counts["accepted"] + local.counts["rejected"]
    assert run(remote, s3_store) == local, "from S3 to S3"
    assert run(remote, store.at("mixed")) == local, "from S3 to disk"
    assert run(f"{kind}:{remote}", store.at("mixed")) == local, "read back"
    assert contents(s3_store) == contents(store.at("mixed"))
    before = list_source(remote).digest
    assert list_source(remote).digest == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_makes_the_same_files(kind, workers, tmp_path, store):
    uri = f"{tmp_path}/data{make(kind, tmp_path / 'data')}"
    expected = run(uri, store.at("0"))
    assert run(uri, store.at("shared"), workers) == expected
    assert contents(store.at("shared")) == contents(store.at("0"))


@pytest.mark.s3
def test_the_digest_of_an_s3_source_tells_another_etag(tmp_path, s3_env):
    uri = upload(write_files(tmp_path, {"a/1.png": image_bytes(1), "b/1.png": image_bytes(1)}))
    before = list_source(uri).digest
    Bucket("tests").write(f"{uri.removeprefix('s3://tests/')}/a/1.png", image_bytes(2))
    assert list_source(uri).digest != before


@pytest.mark.s3
def test_s3_sources_that_are_none_are_refused(s3_env, tmp_path):
    with pytest.raises(ValueError, match="nothing below that prefix"):
        list_source("s3://tests/nowhere-at-all")
    with pytest.raises(ValueError, match="no bucket 'no-such-bucket'"):
        list_source("s3://no-such-bucket/x")
    with pytest.raises(ValueError, match="credentials do not belong in a URI") as caught:
        list_source("s3://key:secret@tests/x")
    assert "secret" not in str(caught.value)
    uri = upload(write_files(tmp_path, {"x-0.tar": tar_bytes(samples(range(4)))}))
    with pytest.raises(ValueError, match=r"'x-1.tar' does not exist \(1 of 2"):
        list_source(f"{uri}/x-{{0..1}}.tar")
    assert len(list_source(f"{uri}/x-{{0..0}}.tar").containers) == 1
    with pytest.raises(ValueError, match="does not exist"):
        list_source(f"{uri}/index.csv")


@pytest.mark.s3
@pytest.mark.parametrize(
    "kind", ["webdataset", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("folder", "parquet"))]
)
def test_lost_storage_is_no_reject(kind, tmp_path, store, s3_env: S3Server, monkeypatch):
    make(kind, tmp_path / "data")
    source = list_source(upload(tmp_path / "data"))
    source_files._bucket.cache_clear()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(TransientError, match="does not answer"):
        prepare(source, CONFIG, out=store)
    source_files._bucket.cache_clear()
    assert not [path for path in store.list() if path.endswith(".parquet.json")], "nothing is marked"


@pytest.mark.s3
@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
def test_one_lost_answer_is_no_damage(kind, tmp_path, store, s3_env, monkeypatch):
    make(kind, tmp_path / "data")
    source, left = list_source(upload(tmp_path / "data")), [3]
    read_range = Bucket.read_range

    def flaky(self: Bucket, key: str, start: int, end: int) -> bytes:
        left[0] -= 1
        if left[0] == 0:
            raise TransientError("lost once")
        return read_range(self, key, start, end)

    monkeypatch.setattr(Bucket, "read_range", flaky)
    with pytest.raises(TransientError, match="lost once"):
        prepare(source, CONFIG, out=store)
    assert left[0] <= 0
    assert prepare(source, CONFIG, out=store).counts["accepted"] >= 40


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_killed_goes_on(kind, tmp_path, store):
    uri = f"{tmp_path}/data{make(kind, tmp_path / 'data')}"
    expected = run(uri, store.at("whole"))
    killed = store.at("killed")
    script = (
        "import os, signal, sys\n"
        "from infra.store.store import Store\n"
        "from tests.support.image_sources import CONFIG\n"
        "from sftok.prepare.prepare import prepare\n"
        "from sftok.sources.sources import list_source\n"
        "create, left = Store.create, [int(sys.argv[3])]\n"
        "def counted(self, key, data):\n"
        "    if left[0] == 0:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    left[0] -= 1\n"
        "    return create(self, key, data)\n"
        "Store.create = counted\n"
        "prepare(list_source(sys.argv[1]), CONFIG, out=Store(sys.argv[2]))\n"
    )
    containers = len(list_source(uri).containers)
    done = subprocess.run([sys.executable, "-c", script, uri, killed.uri, str(containers + 2)], check=False)
    assert done.returncode == -signal.SIGKILL
    finished = [name for name in killed.list() if name.endswith(".json") and "/" not in name]
    assert len(finished) == 2
    times = {name: os.stat(killed.path / name).st_mtime_ns for name in finished}
    assert run(uri, killed) == expected
    assert contents(killed) == contents(store.at("whole"))
    assert {name: os.stat(killed.path / name).st_mtime_ns for name in finished} == times, "kept as they were"


def test_containers_are_not_read_again_after_a_kill(tmp_path, store, monkeypatch):
    make("parquet", tmp_path / "data")
    expected = run(str(tmp_path / "data"), store.at("whole"))

    class Killed(BaseException):
        pass

    def kill(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "plan_shards", kill)
        with pytest.raises(Killed):
            run(str(tmp_path / "data"), store)
    monkeypatch.setattr(ParquetUnpacker, "__call__", lambda *_: pytest.fail("read again"))
    assert run(str(tmp_path / "data"), store) == expected


def test_after_too_many_rejects_nothing_is_read_again(tmp_path, store, monkeypatch):
    rows = [{"image": {"bytes": image_bytes(n) if n % 2 else b"", "path": None}, "label": 0} for n in range(1000)]
    pq.write_table(pa.Table.from_pylist(rows, schema=hf_schema(["a"])), tmp_path / "x.parquet")
    source = list_source(str(tmp_path / "x.parquet"))
    with pytest.raises(ValueError, match=r"500 x empty file"):
        prepare(source, CONFIG, out=store)
    assert not [name for name in store.list() if name.endswith(".bin")], "bytes that are in shards now"
    monkeypatch.setattr(ParquetUnpacker, "__call__", lambda *_: pytest.fail("read again"))
    monkeypatch.setattr(FolderReader, "__call__", lambda *_: pytest.fail("read again"))
    counts = prepare(source, CONFIG.model_copy(update={"max_reject_rate": 0.5}), out=store).counts
    assert (counts["accepted"], counts["rejected"]) == (500, 500)
    assert not store.list("opened")


# --- odd images inside containers


def odd_images() -> dict[str, bytes]:
    return {f"{n:03d}": make_it() for n, (make_it, _) in enumerate(ODD.values())}


def broken_images() -> dict[str, bytes]:
    return {f"b{n:03d}": make_it() for n, (make_it, _) in enumerate(BROKEN.values())}


def test_odd_and_broken_images_in_containers(tmp_path, store):
    images = odd_images() | broken_images()
    members = [part for name, data in images.items() for part in ((f"{name}.jpg", data), (f"{name}.cls", b"0"))]
    write_files(tmp_path / "tar", {"x.tar": tar_bytes(members)})
    rows = [{"image": {"bytes": data, "path": f"x.tar/{name}.jpg"}, "label": 0} for name, data in images.items()]
    (tmp_path / "parquet").mkdir()
    pq.write_table(pa.Table.from_pylist(rows, schema=hf_schema(["0"])), tmp_path / "parquet/x.parquet")
    prepared = [run(str(tmp_path / kind), store.at(kind)) for kind in ("tar", "parquet")]
    assert prepared[0] == prepared[1], "the same ids, bytes and labels: the same files"
    assert prepared[0].counts["accepted"] == len(ODD)
    told = reasons(store.at("tar"))
    for n, (_, reason) in enumerate(BROKEN.values()):
        assert re.search(reason, told[f"x.tar/b{n:03d}.jpg"])
    for row in rows_of(store.at("tar"), prepared[0]):
        color = list(ODD.values())[int(row["image_id"][6:9])][1]
        pixels = np.asarray(to_rgb(row["image"]["bytes"])).reshape(-1, 3)
        np.testing.assert_allclose(pixels, np.tile(color, (64, 1)), atol=2)


def test_hugging_face_opens_what_comes_of_each_kind(tmp_path, store, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for kind in KINDS:
        uri = f"{tmp_path}/{kind}{make(kind, tmp_path / kind)}"
        prepared = run(uri, store.at(kind))
        files = {split: sorted(map(str, store.at(kind).path.glob(f"{split}-*.parquet"))) for split in ("train", "val")}
        loaded = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / f"cache-{kind}"))
        assert loaded["train"].num_rows == prepared.counts["train"]
        assert isinstance(loaded["val"][0]["image"], Image.Image)
        names = ["0", "1"] if kind == "webdataset" else ["a", "b"]
        assert loaded["train"].features["label"].names == names


# --- how much may be rejected


def many(root: Path, count: int, bad: int) -> Source:
    data = image_bytes(1, size=(2, 2))
    files = {f"a/{n}.png": data if n >= bad else (b"", b"text", b"x" * n)[n % 3] for n in range(count)}
    return list_source(str(write_files(root, files)))


def test_too_many_rejects_fail_a_large_source(tmp_path, store):
    source = many(tmp_path / "data", 1000, 11)
    with pytest.raises(ValueError, match="are rejected") as caught:
        prepare(source, CONFIG, out=store)
    message = str(caught.value)
    assert "11 of 1,000 entries are rejected, a share of 0.011 above data.max_reject_rate = 0.01" in message
    assert "7 x not an image in a known format; 4 x empty file" in message
    assert "raise data.max_reject_rate" in message
    assert "\n" not in message
    assert len(reasons(store)) == 11
    raised = CONFIG.model_copy(update={"max_reject_rate": 0.011})
    assert prepare(source, raised, out=store).counts["rejected"] == 11


def test_small_sources_and_few_rejects_pass(tmp_path, store):
    assert prepare(many(tmp_path / "a", 999, 300), CONFIG, out=store.at("a")).counts["rejected"] == 300
    assert prepare(many(tmp_path / "b", 1000, 10), CONFIG, out=store.at("b")).counts["rejected"] == 10


# --- columns of entries


def test_entries_in_columns_are_the_entries():
    entries = [
        Entry("b", 1),
        Entry("a\n", 2, "etag", "class", "val", "problem", "file.tar", 7, "name"),
        Entry("ü", 3, file="x", offset=0),
    ]
    columns = Entries.of(iter(entries))
    assert list(columns) == entries
    assert [columns[0], columns[-1]] == [entries[0], entries[-1]]
    assert list(columns[1:]) == entries[1:]
    assert [entry.image_id for entry in columns.sorted()] == sorted(entry.image_id for entry in entries)
    assert list(Entries.join([columns, columns])) == entries * 2
    assert list(Entries.of(())) == []
    with pytest.raises(IndexError):
        columns[3]
    same = Entries.of([Entry("a", 9, problem="odd"), Entry("a", 1)]).without_repetitions()
    assert [entry.problem for entry in same] == [None, "odd"], "a name in use by what is rejected is free"
    twice = Entries.of([Entry("b", 1), Entry("a", 2), Entry("b", 3)]).without_repetitions()
    assert [(entry.size, entry.problem) for entry in twice] == [
        (2, None),
        (1, None),
        (3, "another entry has the same name"),
    ]


def test_entries_of_an_imagenet_fit_into_memory():
    count = 100_000
    paths = (f"train/n01440764/n01440764_{n}.JPEG" for n in range(count))
    entries = Entries.of(Entry(path, 110_000, "1700000000000000000", "n01440764", "train") for path in paths)
    assert entries.table.nbytes / count < 200, "bytes an entry: 250 MB for ImageNet"


@pytest.mark.parametrize("part", [1, 7, 1000])
def test_tables_of_containers_are_dealt_in_parts(tmp_path, store, monkeypatch, part):
    make("parquet", tmp_path / "data")
    expected = run(str(tmp_path / "data"), store.at("whole"))
    monkeypatch.setattr("sftok.sources.listing._BATCH", part)
    monkeypatch.setattr("sftok.prepare.plan.BIN", 1)
    assert run(str(tmp_path / "data"), store.at("parts")) == expected
    assert contents(store.at("parts")) == contents(store.at("whole"))
