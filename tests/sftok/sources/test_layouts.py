"""How the files of a dataset lie and are named: folders called like files, patterns, the hub's layout, archives."""

import gzip
import logging
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.store.store import Store
from tests.support.image_sources import (
    contents,
    hf_parquet,
    image_bytes,
    reasons,
    rows_of,
    run,
    samples,
    tar_bytes,
    upload,
    write_files,
)

Place = Callable[[Path], str]


@pytest.fixture(params=["disk", pytest.param("s3", marks=pytest.mark.s3)])
def place(request: pytest.FixtureRequest) -> Place:
    """Put a folder where sources are read from; returns its path or URI."""
    if request.param == "disk":
        return str
    request.getfixturevalue("s3_env")
    return upload


def ids(uri: object, store: Store) -> set[str]:
    return {row["image_id"] for row in rows_of(store, run(uri, store))}


# --- folders called like files


def test_a_folder_is_read_as_what_it_is_whatever_its_name(place, tmp_path, store):
    spark = tmp_path / "data/images.parquet"
    hf_parquet(spark / "part-00000-1.snappy.parquet", range(8), ["a", "b"])
    hf_parquet(spark / "_temporary/0/part-00000-1.parquet", range(50, 58), ["a", "b"])
    write_files(spark, {"_SUCCESS": b"", "._SUCCESS.crc": b"crc", ".part-00000-1.snappy.parquet.crc": b"crc"})
    pictures = {f"pictures.tar/{'ab'[n % 2]}/{n}.png": image_bytes(n) for n in range(8)}
    shards = {f"shards.csv/{n}.tar": tar_bytes(samples(range(n * 4, n * 4 + 4))) for n in range(2)}
    root = place(write_files(tmp_path / "data", pictures | shards))
    assert run(f"{root}/images.parquet", store.at("a")).counts["accepted"] == 8
    assert reasons(store.at("a")) == {
        "._SUCCESS.crc": "a hidden file",
        ".part-00000-1.snappy.parquet.crc": "a hidden file",
        "_SUCCESS": "a file beside the images",
        "_temporary/": "a folder that Spark keeps for itself",
    }
    assert ids(f"{root}/pictures.tar", store.at("b")) == {f"{'ab'[n % 2]}/{n}.png" for n in range(8)}
    assert ids(f"{root}/shards.csv", store.at("c")) == {f"{n // 4}.tar/{n:05d}.png" for n in range(8)}
    assert ids(f"{root}/*.parquet", store.at("d")) == {f"{n}.png" for n in range(8)}


def test_an_index_in_parts_is_refused(refusal, tmp_path):
    table = pa.table({"path": ["a.png"], "label": ["a"]})
    (tmp_path / "index.parquet").mkdir()
    pq.write_table(table, tmp_path / "index.parquet/part-0.parquet")
    message = "no column holds images as bytes (path (string), label (string)): store the bytes of one file per row"
    assert message in refusal(tmp_path / "index.parquet")
    assert "index.parquet' is a folder: give the index itself" in refusal(f"index:{tmp_path}/index.parquet")


# --- patterns


def make_shards(root: Path) -> Path:
    for part in range(3):
        write_files(root, {f"d/train-{part}.tar": tar_bytes(samples(range(part * 4, part * 4 + 4)))})
        hf_parquet(root / f"p/{'xyz'[part]}/{part}.parquet", range(part * 4, part * 4 + 4), ["a", "b"])
    return write_files(root, {"d/.train-9.tar": b"hidden", "d/other.txt": b""})


@pytest.mark.parametrize(
    ("pattern", "parts"),
    [
        ("d/*.tar", "012"),
        ("d/train-?.tar", "012"),
        ("d/train-[01].tar", "01"),
        ("d/train-{1..2}.tar", "12"),
        ("*/train-{0,2}.t*r", "02"),
        ("p/*/*.parquet", "012"),
        ("p/{x,z}/?.parquet", "02"),
    ],
)
def test_patterns_are_those_of_a_shell(place, tmp_path, store, pattern, parts):
    root = place(make_shards(tmp_path / "data"))
    kind = "" if pattern.endswith((".tar", ".parquet")) else "webdataset:"
    found = ids(f"{kind}{root}/{pattern}", store)
    assert {int(path.rpartition("/")[2][:-4]) for path in found} == {int(p) * 4 + n for p in parts for n in range(4)}


def test_patterns_without_a_match_are_refused(refusal, place, tmp_path):
    root = place(make_shards(tmp_path / "data"))
    assert f"'val-*.tar' matches no file in {root}/d: correct the name" in refusal(f"{root}/d/val-*.tar")
    assert "'train-3.tar' does not exist (1 of 2 files): correct the name" in refusal(f"{root}/d/train-{{2,3}}.tar")
    assert "** is not read: name the folder, which is read at any depth" in refusal(f"{root}/**/*.tar")
    assert "is a pattern of neither .tar nor .parquet files" in refusal(f"{root}/d/*.png")


def test_what_exists_wins_over_a_pattern(place, tmp_path, store):
    odd = "{0..3}*[x]?"
    files = {f"{odd}/{'ab'[n % 2]}/{n}.png": image_bytes(n) for n in range(8)}
    files |= {f"tars {odd}/{odd}.tar": tar_bytes(samples(range(4))), f"tars {odd}/0.tar": tar_bytes(samples(range(9)))}
    root = place(write_files(tmp_path / "data", files))
    assert len(ids(f"{root}/{odd}", store.at("a"))) == 8
    assert ids(f"{root}/tars {odd}/{odd}.tar", store.at("b")) == {f"{odd}.tar/{n:05d}.png" for n in range(4)}
    assert len(ids(f"{root}/tars {odd}/*.tar", store.at("c"))) == 13
    hf_parquet(tmp_path / f"p/{odd}.parquet", range(4), ["a", "b"])
    assert len(ids(tmp_path / f"p/{odd}.parquet", store.at("d"))) == 4


# --- the Hugging Face hub's layout


@pytest.mark.parametrize("train", ["train", "partial-train"])
def test_the_hub_s_layout_has_its_splits(place, tmp_path, store, train, caplog):
    root = tmp_path / "data"
    hf_parquet(root / f"default/{train}/0000.parquet", range(8), ["a", "b"])
    hf_parquet(root / "default/validation/0000.parquet", range(10, 14), ["a", "b"])
    hf_parquet(root / "default/test/0000.parquet", range(20, 24), ["a", "b"])
    with caplog.at_level(logging.WARNING):
        counts = run(place(root), store).counts
    assert (counts["train"], counts["val"]) == (8, 4)
    assert caplog.messages[0].endswith("only train and val files are read, not default/test/0000.parquet")


def test_several_datasets_in_one_folder_are_refused(refusal, place, tmp_path, store):
    for n, name in enumerate(("large", "small")):
        hf_parquet(tmp_path / f"data/{name}/train/0000.parquet", range(n * 4, n * 4 + 4), ["a", "b"])
    root = place(tmp_path / "data")
    assert (
        f"source {root!r} holds several datasets, 'large/train/0000.parquet' and 'small/train/0000.parquet': name one "
        f"of their folders, such as {root}/large, or the files of several by a pattern"
    ) in refusal(root)
    assert run(f"{root}/large", store.at("one")).counts["accepted"] == 4
    assert run(f"{root}/*/train/*.parquet", store.at("all")).counts["accepted"] == 8


# --- archives


def gzipped(numbers: range) -> bytes:
    return gzip.compress(tar_bytes(samples(numbers)), mtime=0)


def test_compressed_tars_hold_the_same_images(place, tmp_path, store, monkeypatch):
    monkeypatch.setattr("sftok.sources.containers.PIECE_BYTES", 300)
    plain = write_files(tmp_path / "plain", {"x.tar": tar_bytes(samples(range(12)))})
    root = write_files(tmp_path / "data", {"x.tar.gz": gzipped(range(12))})
    read = [
        {row["image_id"].rpartition("/")[2]: (row["sha256"], row["label"]) for row in rows_of(out, run(uri, out))}
        for uri, out in ((plain, store.at("plain")), (place(root), store.at("gz")))
    ]
    assert read[0] == read[1]
    assert len(read[0]) == 12
    assert not [name for name in contents(store.at("gz")) if name.startswith("opened")]
    several = write_files(tmp_path / "s", {"a.tgz": gzipped(range(4)), "b.tar": tar_bytes(samples(range(4, 8)))})
    assert len(ids(several, store.at("s"))) == 8
    assert len(ids(f"{several}/?.tgz", store.at("t"))) == 4


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (gzipped(range(8))[:-40], "the tar is damaged: Compressed file ended before the end-of-stream marker"),
        (gzipped(range(8))[:300] + bytes(40) + gzipped(range(8))[340:], "the tar is damaged"),
        (b"no tar", "the tar is damaged: "),
        (gzip.compress(tar_bytes(samples(range(8)))[:-10240]), "the tar has no end mark"),
    ],
)
def test_damaged_compressed_tars_are_told(tmp_path, store, data, reason):
    root = write_files(tmp_path / "data", {"x.tar.gz": data, "y.tar.gz": gzipped(range(20, 24))})
    prepared = run(root, store)
    assert reasons(store)["x.tar.gz"].startswith(reason)
    assert prepared.counts["found"] == prepared.counts["accepted"] + prepared.counts["rejected"]


def test_a_tar_that_is_compressed_by_mistake_is_read_once_renamed(tmp_path, store):
    root = write_files(tmp_path / "data", {"x.tar": gzipped(range(8))})
    with pytest.raises(
        ValueError, match=r"no usable image \(1 of 1 entries are rejected, such as 'x.tar': the tar is com"
    ):
        run(root, store)
    (root / "x.tar").rename(root / "x.tar.gz")
    assert run(root, store.at("renamed")).counts["accepted"] == 8


def test_other_archives_are_refused(refusal, tmp_path):
    write_files(tmp_path, {"x.zip": b"PK", "y/x.tar.xz": b"xz"})
    assert "x.zip' is an archive of a kind that is not read: unpack it, and name the folder" in refusal(
        tmp_path / "x.zip"
    )
    assert "holds x.tar.xz but no images: name an index itself, unpack archives" in refusal(tmp_path / "y")
