"""Images in Parquet, and indexes of images: columns, class names, ids and what is odd in them."""

import io
import json
import logging
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.store.store import Store
from sftok.sources import containers
from sftok.sources.sources import list_source
from tests.support.image_sources import (
    CONFIG,
    contents,
    hf_parquet,
    hf_schema,
    image_bytes,
    noise,
    reasons,
    rows_of,
    run,
    write_files,
)

# --- Parquet


def test_hugging_face_images_with_splits_and_names(tmp_path, store, caplog):
    root = tmp_path / "data"
    for part in range(2):
        hf_parquet(root / f"data/train-{part:05d}-of-00002.parquet", range(part * 10, part * 10 + 10), ["zebra", "ant"])
    hf_parquet(root / "data/validation-00000-of-00001.parquet", range(50, 60), ["zebra", "ant"])
    hf_parquet(root / "data/test-00000-of-00001.parquet", range(70, 80), ["zebra", "ant"])
    with caplog.at_level(logging.WARNING):
        prepared = run(root, store)
    assert "not data/test-00000" in caplog.text
    accepted = {"accepted": 30, "train": 20, "val": 10, "classes": 2}
    assert prepared.counts == {**accepted, "found": 31, "rejected": 1, "left_out": 1}
    for row in rows_of(store, prepared):
        number = int(row["image_id"].removesuffix(".png"))
        assert row["image"]["bytes"] == image_bytes(number)
        assert row["label"] == number % 2, "ids are those of the schema, not of sorted names"
        assert row["split"] == ("val" if number >= 50 else "train")
    schema = pq.read_schema(io.BytesIO(store.read("train-00000-of-00003.parquet")))
    assert json.loads(schema.metadata[b"sftok"])["class_names"] == ["zebra", "ant"]


def test_what_prepare_wrote_can_be_prepared_again(tmp_path, store):
    files = {f"{'ab'[number % 2]}/{number}.png": image_bytes(number) for number in range(30)}
    first = run(write_files(tmp_path / "data", files), store.at("one"))
    store.at("one").delete("rejects.parquet")
    second = run(store.at("one").path, store.at("two"))
    assert (second.content_digest, second.counts["accepted"]) == (first.content_digest, first.counts["accepted"])
    assert set(reasons(store.at("two")).values()) == {"a file beside the images"}
    assert second.counts["rejected"] == second.counts["left_out"] == len(reasons(store.at("two")))


def plain(path, columns: dict[str, pa.Array]) -> object:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


BYTES = pa.array([image_bytes(number) for number in range(12)])
NAMES = pa.array(["dog", "cat", None] * 4)


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_plain_tables_of_bytes(tmp_path, store, kind):
    path = plain(tmp_path / "x.parquet", {"jpeg": BYTES.cast(kind), "label": NAMES, "width": pa.array(range(12))})
    prepared = run(path, store)
    assert prepared.counts["accepted"] == 8
    rows = rows_of(store, prepared)
    assert {row["image_id"]: row["label"] for row in rows} == {
        f"x.parquet#{number}": 1 - number % 3 for number in range(12) if number % 3 < 2
    }
    assert reasons(store)["x.parquet#2"] == "it has no label"


def test_columns_are_named_where_they_cannot_be_told(tmp_path, store):
    path = plain(tmp_path / "x.parquet", {"small": BYTES, "full": BYTES, "kind": NAMES})
    with pytest.raises(ValueError, match=r"2 of the columns small, full, kind can hold images .*data.image_column"):
        list_source(str(path))
    config = CONFIG.model_copy(update={"image_column": "full"})
    with pytest.raises(ValueError, match=r"no labels .*data.label_column"):
        list_source(str(path), config)
    assert run(path, store, image_column="full", label_column="kind").counts["classes"] == 2
    assert run(path, store.at("x"), image_column="full", labels="none").counts["accepted"] == 12
    for field in ("image_column", "label_column"):
        with pytest.raises(ValueError, match=rf"data.{field} = 'nowhere' is no column"):
            list_source(str(path), CONFIG.model_copy(update={"image_column": "full", field: "nowhere"}))


def odd_table() -> pa.Table:
    rows = [{"image": {"bytes": image_bytes(number), "path": f"{number}.png"}, "label": 0} for number in range(8)]
    rows += [
        {"image": None, "label": 0},
        {"image": {"bytes": None, "path": "/elsewhere/9.png"}, "label": 0},
        {"image": {"bytes": b"", "path": "empty.png"}, "label": 0},
        {"image": {"bytes": b"no image", "path": "text.png"}, "label": 0},
        {"image": {"bytes": image_bytes(12), "path": "far.png"}, "label": 2},
        {"image": {"bytes": image_bytes(13), "path": "none.png"}, "label": None},
        {"image": {"bytes": image_bytes(14), "path": "minus.png"}, "label": -1},
    ]
    return pa.Table.from_pylist(rows, schema=hf_schema(["a", "b"]))


def test_odd_rows_are_told(tmp_path, store):
    pq.write_table(odd_table(), tmp_path / "x.parquet")
    prepared = run(tmp_path / "x.parquet", store)
    assert (prepared.counts["found"], prepared.counts["accepted"], prepared.counts["rejected"]) == (15, 8, 7)
    assert reasons(store) == {
        "x.parquet#8": "no bytes",
        "x.parquet#9": "no bytes, only the path '/elsewhere/9.png'",
        "empty.png": "empty file",
        "text.png": "not an image in a known format",
        "x.parquet#12": "its label 2 is not between 0 and 1",
        "none.png": "it has no label",
        "minus.png": "it has no label",
    }


@pytest.mark.parametrize(
    "paths", [["a.png"] * 2, ["/a.png", "b.png"], ["../a.png", "b.png"], ["a.png", None], ["", "b"]]
)
def test_paths_that_are_no_names_give_way_to_rows(tmp_path, store, paths):
    rows = [{"image": {"bytes": image_bytes(n), "path": path}, "label": 0} for n, path in enumerate(paths)]
    pq.write_table(pa.Table.from_pylist(rows, schema=hf_schema(["a"])), tmp_path / "x.parquet")
    prepared = run(tmp_path / "x.parquet", store)
    assert {row["image_id"] for row in rows_of(store, prepared)} == {"x.parquet#0", "x.parquet#1"}


def test_a_damaged_file_is_told_and_the_others_are_read(tmp_path, store):
    root = tmp_path / "data"
    good = hf_parquet(root / "a.parquet", range(20), ["a", "b"]).read_bytes()
    (root / "b.parquet").write_bytes(good[:-30])
    (root / "c.parquet").write_bytes(b"")
    os.symlink("nowhere", root / "d.parquet")
    prepared = run(root, store)
    assert prepared.counts["accepted"] == 20
    told = reasons(store)
    assert told.keys() == {"b.parquet", "c.parquet", "d.parquet"}
    assert "cannot be read" in told["b.parquet"]


def test_rows_lost_in_a_damaged_page_are_told_one_by_one(tmp_path, store):
    root = tmp_path / "data"
    hf_parquet(root / "a.parquet", range(20), ["a", "b"])
    rows = [{"image": {"bytes": noise(n, (40, 30)), "path": f"{n}.png"}, "label": 0} for n in range(100, 140)]
    table = pa.Table.from_pylist(rows, schema=hf_schema(["a", "b"]))
    pq.write_table(table, root / "b.parquet", row_group_size=10, compression="snappy", use_dictionary=False)
    data = (root / "b.parquet").read_bytes()
    page = data.index(b"\x89PNG", len(data) // 2) - 60  # near the head of a page in the third group
    (root / "b.parquet").write_bytes(data[:page] + b"\xff" * 300 + data[page + 300 :])
    prepared = run(root, store)
    told = reasons(store)
    assert told
    assert all("damaged" in reason for reason in told.values())
    assert prepared.counts["found"] == 60
    assert prepared.counts["rejected"] == len(told) >= 10


def test_files_of_other_datasets_are_refused(tmp_path, store):
    hf_parquet(tmp_path / "a.parquet", range(4), ["a", "b"])
    hf_parquet(tmp_path / "b.parquet", range(4), ["b", "a"])
    with pytest.raises(ValueError, match=r"b.parquet has other class names than the first"):
        run(tmp_path, store)
    plain(tmp_path / "b.parquet", {"picture": BYTES})
    with pytest.raises(ValueError, match=r"b.parquet has no column 'image'"):
        run(tmp_path, store.at("x"))


def test_images_are_laid_open_in_bounded_pieces(tmp_path, store, monkeypatch):
    monkeypatch.setattr(containers, "PIECE_BYTES", 700)
    sizes = []
    write = Store.write

    def recorded(self: Store, key: str, data: bytes) -> None:
        if key.endswith(".bin"):
            sizes.append(len(data))
        write(self, key, data)

    monkeypatch.setattr(Store, "write", recorded)
    prepared = run(hf_parquet(tmp_path / "x.parquet", range(40), ["a", "b"]), store)
    assert len(sizes) > 4
    assert max(sizes) <= 700
    assert sum(sizes) == sum(len(image_bytes(number)) for number in range(40))
    assert all(row["image"]["bytes"] == image_bytes(int(row["image_id"][:-4])) for row in rows_of(store, prepared))
    assert not [name for name in contents(store) if name.startswith("opened")]


def test_no_parquet_that_can_be_read_is_refused(tmp_path):
    write_files(tmp_path, {"x.parquet": b"no table"})
    with pytest.raises(ValueError, match=r"no Parquet file can be read \(x.parquet: "):
        list_source(str(tmp_path))


# --- index


def pictures(tmp_path, count=12):
    return write_files(tmp_path / "data", {f"img/{n}.png": image_bytes(n) for n in range(count)})


def test_csv_with_names_splits_and_odd_paths(tmp_path, store):
    root = pictures(tmp_path)
    write_files(root, {'img/"q", ü\n1.png': image_bytes(50)})
    (root / "img/folder").mkdir()
    elsewhere = write_files(tmp_path / "other", {"far.png": image_bytes(60)})
    lines = [f"img/{n}.png,{'cat' if n % 2 else 'dog'},{'validation' if n > 8 else 'train'}" for n in range(12)]
    lines += [
        '"img/""q"", ü\n1.png",cat,train',
        f"{elsewhere}/far.png,dog,train",
        f"file://{elsewhere}/far.png,dog,train",
    ]
    lines += [
        "img/gone.png,cat,train",
        "img/0.png,cat,train",
        "img/folder,cat,train",
        ",cat,train",
        "nowhere/1.png,cat,validation",
    ]
    lines += ["img/1.png,cat,test"]
    (root / "index.csv").write_text("path,label,split\n" + "\n".join(lines) + "\n")
    prepared = run(root / "index.csv", store)
    rows = {row["image_id"]: row for row in rows_of(store, prepared)}
    assert rows.keys() == {f"img/{n}.png" for n in range(12)} | {
        'img/"q", ü\n1.png',
        f"{elsewhere}/far.png",
        f"file://{elsewhere}/far.png",
    }
    assert rows["img/3.png"]["label"] == 0
    assert rows["img/2.png"]["label"] == 1
    assert {n for n in range(12) if rows[f"img/{n}.png"]["split"] == "val"} == {9, 10, 11}
    assert rows[f"{elsewhere}/far.png"]["image"]["bytes"] == image_bytes(60)
    told = reasons(store)
    assert told.pop("img/0.png") == "another entry has the same name"
    assert told.pop("img/folder") == "a folder named like an image"
    assert told.pop("img/gone.png") == told.pop("nowhere/1.png") == "there is no such file"
    assert list(told.values()) == ["the index has no path here"]


def test_labels_of_an_index_are_text_or_numbers(tmp_path, store):
    root = pictures(tmp_path)
    (root / "a.tsv").write_text("file_name\tlabel\n" + "".join(f"img/{n}.png\t{n % 3}\n" for n in range(12)))
    assert {r["label"] for r in rows_of(store.at("a"), run(root / "a.tsv", store.at("a")))} == {0, 1, 2}
    table = pa.table({"path": [f"img/{n}.png" for n in range(12)], "label": pa.array([0.0, 1.0, None] * 4)})
    pq.write_table(table, root / "b.parquet")
    prepared = run(root / "b.parquet", store.at("b"), labels="optional")
    assert {r["label"] for r in rows_of(store.at("b"), prepared)} == {0, 1, None}
    (tmp_path / "names.txt").write_text("zero\none\ntwo\n")
    prepared = run(root / "a.tsv", store.at("c"), class_names_file=str(tmp_path / "names.txt"))
    assert (prepared.counts["classes"], prepared.counts["accepted"]) == (3, 12)


def test_an_index_without_labels(tmp_path, store):
    root = pictures(tmp_path)
    (root / "index.csv").write_text("path\n" + "".join(f"img/{n}.png\n" for n in range(12)))
    with pytest.raises(ValueError, match=r"no labels \(columns path.*set data.labels = none"):
        list_source(str(root / "index.csv"))
    assert run(root / "index.csv", store, labels="none").counts["accepted"] == 12


def test_the_digest_of_an_index_tells_labels_and_files(tmp_path):
    root = pictures(tmp_path)

    def digest(text: str) -> str:
        (root / "index.csv").write_text(text)
        return list_source(str(root / "index.csv")).digest

    one = digest("path,label\nimg/1.png,a\nimg/2.png,b\n")
    assert digest("path,label\nimg/2.png,b\nimg/1.png,a\n") == one, "order is nothing"
    assert digest("path,label\nimg/1.png,b\nimg/2.png,a\n") != one
    digest("path,label\nimg/1.png,a\nimg/2.png,b\n")
    os.utime(root / "img/1.png", ns=(1, 1))
    assert list_source(str(root / "index.csv")).digest != one


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read as an index"),
        ("path,label\n", "names no images"),
        ("where,label\na.png,1\n", "has the columns where, label: name that of paths in data.image_column"),
        ("path,label\na.png,1,2\n", "cannot be read as an index"),
        ("path,label,split\na.png,1,holdout\n", "split 'holdout' is none of train, training, val"),
        ("path,label,split\na.png,1,val\n", "val rows but no train rows"),
    ],
)
def test_what_is_no_index_is_refused(tmp_path, text, message):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        list_source(str(tmp_path / "x.csv"))
    assert "\n" not in str(caught.value)


# --- recognition


def test_kinds_are_recognised_or_said(tmp_path):
    hf_parquet(tmp_path / "mixed/a.parquet", range(4), ["a", "b"])
    write_files(tmp_path / "mixed", {"a/1.png": image_bytes(1), "b/1.png": image_bytes(1)})
    with pytest.raises(ValueError, match=r"holds a.parquet \(parquet:\) and a/1.png \(folder:\): say which"):
        list_source(str(tmp_path / "mixed"))
    assert [entry.problem for entry in list_source(f"folder:{tmp_path}/mixed").entries] == [
        "a file beside the images",
        None,
        None,
    ]
    assert len(list_source(f"parquet:{tmp_path}/mixed").containers) == 1
    with pytest.raises(ValueError, match=r"holds no \.tar file"):
        list_source(f"webdataset:{tmp_path}/mixed")
    plain(tmp_path / "numbers.parquet", {"x": pa.array([1])})
    with pytest.raises(ValueError, match="has the columns x, of which none holds images or paths"):
        list_source(str(tmp_path / "numbers.parquet"))
    write_files(tmp_path / "archives", {"x.tar.xz": b"1"})
    with pytest.raises(ValueError, match=r"holds x.tar.xz but no images"):
        list_source(str(tmp_path / "archives"))
    for missing in ("x.parquet", "x.tar", "x.csv", "x-{0..3}.tar", "webdataset:y", "index:y", "parquet:y", "folder:y"):
        with pytest.raises(ValueError, match="does not exist"):
            list_source(missing)
    with pytest.raises(ValueError, match="names no place after"):
        list_source("webdataset:")


@pytest.mark.parametrize(
    ("text", "message"), [(None, "FileNotFound"), (b"\xff\xfe", "UnicodeDecode"), (b"a\n\nb", "line 2 is empty")]
)
def test_class_name_files_are_checked(tmp_path, text, message):
    root = write_files(tmp_path / "data", {"a/1.png": image_bytes(1)})
    if text is not None:
        (tmp_path / "names").write_bytes(text)
    with pytest.raises(ValueError, match=rf"data.class_names_file = .*{message}"):
        list_source(str(root), CONFIG.model_copy(update={"class_names_file": str(tmp_path / "names")}))


def test_class_names_of_folders_are_in_the_order_of_the_file(tmp_path, store):
    root = write_files(tmp_path / "data", {f"{'ab'[n % 2]}/{n}.png": image_bytes(n) for n in range(20)})
    (tmp_path / "names").write_text("b\nc\na\n")
    prepared = run(root, store, class_names_file=str(tmp_path / "names"))
    assert {(row["image_id"][0], row["label"]) for row in rows_of(store, prepared)} == {("a", 2), ("b", 0)}
    (tmp_path / "names").write_text("b\n")
    with pytest.raises(ValueError, match=r"class folder 'a' is not in data\.class_names_file"):
        run(root, store.at("x"), class_names_file=str(tmp_path / "names"))


def test_folders_without_classes_only_where_asked(tmp_path, store):
    files = {f"{n}.png": image_bytes(n) for n in range(8)} | {"deep/er/9.png": image_bytes(9)}
    root = write_files(tmp_path / "data", files)
    config = CONFIG.model_copy(update={"labels": "none"})
    assert [entry.image_id for entry in list_source(str(root), config).entries] == sorted(files)
    prepared = run(root, store, labels="none")
    assert (prepared.counts["accepted"], prepared.counts["classes"]) == (9, 0)
    optional = run(root, store.at("x"), labels="optional", val_fraction=0.01)
    assert {row["label"] for row in rows_of(store.at("x"), optional)} == {None, 0}
    both = write_files(tmp_path / "both", {"train/1.png": image_bytes(1), "val/2.png": image_bytes(2)})
    splits = {row["image_id"]: row["split"] for row in rows_of(store.at("y"), run(both, store.at("y"), labels="none"))}
    assert splits == {"train/1.png": "train", "val/2.png": "val"}
