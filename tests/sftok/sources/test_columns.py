"""Columns of indexes and of image Parquet: names, delimiters, types, base64, and paths that lead nowhere."""

import base64
import decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.store.store import Store
from sftok.sources.sources import list_source
from tests.support.image_sources import CONFIG, image_bytes, reasons, rows_of, run, upload, write_files

COUNT = 8
IMAGES = [image_bytes(number) for number in range(COUNT)]
TEXTS = [base64.b64encode(image).decode() for image in IMAGES]
PATHS = [f"img/{number}.png" for number in range(COUNT)]
LABELS = ["cat", "dog"] * (COUNT // 2)


def pictures(root: Path) -> Path:
    return write_files(root, dict(zip(PATHS, IMAGES, strict=True)))


def labels(uri: object, store: Store, **changes: object) -> list[int]:
    rows = rows_of(store, run(uri, store, **changes))
    assert sorted(row["image"]["bytes"] for row in rows) == sorted(IMAGES)
    by_image = {row["image"]["bytes"]: row["label"] for row in rows}
    return [by_image[image] for image in IMAGES]


def table(where: Path, /, **columns: object) -> Path:
    where.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), where)
    return where


# --- names and delimiters


@pytest.mark.parametrize(
    ("name", "header", "row", "end"),
    [
        ("i.csv", "path, label", "{path}, {label}", "\n"),
        ("i.csv", "label, path ", "{label}, {path} ", "\n"),
        ("i.csv", "\ufeffPath,LABEL", "{path},{label}", "\r\n"),
        ("i.csv", "\ufeffid;File_Name;Class", "0;{path};{label}", "\r\n"),
        ("i.csv", "path\tlabel", "{path}\t{label}", "\n"),
        ("i.tsv", "path,label", "{path},{label}", "\n"),
        ("i.csv", '"path"|"label"', '"{path}"|"{label}"', "\r"),
        ("i.csv", "path,label,note,note", "{path},{label},x,y", "\n"),
    ],
)
def test_tables_as_people_write_them(tmp_path, store, name, header, row, end):
    lines = [header, *(row.format(path=path, label=label) for path, label in zip(PATHS, LABELS, strict=True))]
    (pictures(tmp_path) / name).write_bytes("".join(line + end for line in lines).encode())
    assert labels(tmp_path / name, store) == [0, 1] * 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label,label\na,1,2\n", "has 2 columns 'label' ('label', 'label'): rename or remove all but one"),
        ("path,Label,label\na,1,2\n", "has 2 columns 'label' ('Label', 'label'): name one in data.label_column"),
        ("Path,path ,label\na,a,1\n", "has 2 columns 'path' ('Path', 'path '): name one in data.image_column"),
        ("path,label,split,Split\na,1,val,val\n", "has 2 columns 'split' ('split', 'Split'): rename or remove all but"),
        ("where,label\na,1\n", "has the columns where, label: name that of paths in data.image_column"),
        ("path,klass\na,1\n", "has no labels (columns path, klass; data.label_column names another one): add them, or"),
        ("path,label\n\xfc.png,1\n", "invalid UTF8 data; save it as UTF-8 text"),
        (
            f"path,label\n{TEXTS[0]},1\n",
            "column 'path' holds images as base64 text, not paths: save the table as Parquet",
        ),
        (f"{TEXTS[0]},label\na,1\n", "..., label: name that of paths in data.image_column"),
        (f"path,label,split\na,1,{TEXTS[0]}\n", "characters) is none of train, training, val"),
    ],
)
def test_tables_that_leave_a_choice_are_refused(refusal, tmp_path, text, message):
    (tmp_path / "i.csv").write_bytes(text.encode("latin-1"))
    assert message in refusal(tmp_path / "i.csv")


def test_a_column_among_several_is_told_and_can_be_named(tmp_path, store):
    numbers = list(range(COUNT))
    path = table(pictures(tmp_path) / "i.parquet", path=PATHS, file=PATHS[::-1], Label=LABELS, target=numbers)
    source = list_source(str(path), CONFIG)
    told = "paths: column path, not file, which data.image_column can name; labels: column Label, not target, which "
    assert told + "data.label_column can name" in source.remarks
    assert labels(path, store.at("a")) == [0, 1] * 4
    assert labels(path, store.at("b"), image_column="file", label_column="target") == numbers[::-1]


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        (
            {"image": IMAGES, "Label": LABELS, "label": LABELS},
            "",
            "has 2 columns 'label' ('Label', 'label'): name one in",
        ),
        ({"image": IMAGES, "label": LABELS}, "data.label_column=kind", "data.label_column = 'kind' is no column of"),
        ({"image": IMAGES, "label": LABELS}, "data.image_column=kind", "data.image_column = 'kind' is no column of"),
    ],
)
def test_parquet_that_leaves_a_choice_is_refused(refusal, tmp_path, columns, options, message):
    table(tmp_path / "x.parquet", **columns)
    assert message in refusal(tmp_path / "x.parquet", *(["--set", options] if options else []))


def test_two_columns_of_one_name_in_parquet_are_refused(refusal, tmp_path):
    repeated = pa.Table.from_arrays([pa.array(IMAGES), pa.array(LABELS), pa.array(LABELS)], ["image", "label", "label"])
    pq.write_table(repeated, tmp_path / "x.parquet")
    message = "has 2 columns 'label' ('label', 'label'): rename or remove all but one"
    assert message in refusal(tmp_path / "x.parquet")
    pq.write_table(repeated.set_column(0, "path", pa.array(PATHS)), tmp_path / "i.parquet")
    assert message in refusal(tmp_path / "i.parquet")


# --- types

KINDS_OF_LABELS = {
    "names in a dictionary": (pa.array(LABELS).dictionary_encode(), [0, 1]),
    "bytes in a dictionary": (pa.array([label.encode() for label in LABELS]).dictionary_encode(), [0, 1]),
    "views": (pa.array(LABELS, pa.string_view()), [0, 1]),
    "small numbers": (pa.array([3, 1] * 4, pa.uint8()), [3, 1]),
    "numbers in a dictionary": (pa.array([3, 1] * 4, pa.int8()).dictionary_encode(), [3, 1]),
    "decimals": (pa.array([decimal.Decimal("3.00"), decimal.Decimal("1.00")] * 4), [3, 1]),
    "half floats": (pa.array([3.0, 1.0] * 4, pa.float32()).cast(pa.float16()), [3, 1]),
    "booleans": (pa.array([True, False] * 4), [1, 0]),
}


@pytest.mark.parametrize("kind", KINDS_OF_LABELS)
def test_types_of_labels_that_are_read(tmp_path, store, kind):
    column, expected = KINDS_OF_LABELS[kind]
    assert labels(table(tmp_path / "x.parquet", image=IMAGES, label=column), store.at("images")) == expected * 4
    assert (
        labels(
            table(pictures(tmp_path) / "i.parquet", path=pa.array(PATHS).dictionary_encode(), label=column),
            store.at("index"),
        )
        == expected * 4
    )


@pytest.mark.parametrize("of", ["x.parquet", "i.parquet"])
@pytest.mark.parametrize(
    ("column", "kind"),
    [
        ([[1], [0]] * 4, "list<element: int64>"),
        ([{"id": 1}] * 8, "struct<id: int64>"),
        (pa.array([0] * 8, pa.timestamp("s")), "timestamp[ms]"),
    ],
)
def test_types_that_are_no_labels_are_refused(refusal, tmp_path, of, column, kind):
    images = {"image": IMAGES} if of == "x.parquet" else {"path": PATHS}
    table(tmp_path / of, **images, label=column)
    assert (
        f"column 'label' is of type {kind}, and a label is one number or name: convert it, or name another column in "
        "data.label_column, or set data.labels = none"
    ) in refusal(tmp_path / of)


@pytest.mark.parametrize("images", [{"image": IMAGES}, {"path": PATHS}])
@pytest.mark.parametrize(
    ("column", "seen"),
    [
        (pa.nulls(COUNT), r"none of its 8 entries has one, such as '[^']*[#/]0[^']*'"),
        (pa.array([-1] * COUNT), r"none of its 8 entries has one, such as '[^']*[#/]0[^']*'"),
        (
            pa.array([TEXTS[0] * 9] * COUNT),
            r"8 of 8 entries are rejected, such as .*: its label .* \([0-9,]+ characters\) is too long for the name .*",
        ),
        (
            pa.array([0.5] * COUNT),
            r"8 of 8 entries are rejected, such as '[^']*[#/]0[^']*': its label '0.5' is neither .*",
        ),
    ],
)
def test_columns_without_a_usable_label_say_so(tmp_path, store, images, column, seen):
    path = table(pictures(tmp_path) / "x.parquet", **images, label=column)
    with pytest.raises(ValueError, match=rf"has no labels \({seen}\): add them, or set data.labels = none"):
        run(path, store)
    assert run(path, store.at("none"), labels="none").counts["accepted"] == COUNT


def padded(size: int) -> pa.Array:
    return pa.array([image.ljust(size, b"\0") for image in IMAGES], pa.binary(size))


@pytest.mark.parametrize(
    "images",
    [pa.array(IMAGES).dictionary_encode(), pa.array(IMAGES, pa.binary_view()), pa.array(IMAGES, pa.large_binary())],
)
def test_types_of_images_that_are_read(tmp_path, store, images):
    digests = pa.array([bytes(16)] * COUNT, pa.binary(16))
    assert labels(table(tmp_path / "x.parquet", uuid=digests, image=images, label=LABELS), store) == [0, 1] * 4


def test_images_of_a_fixed_size_are_read(tmp_path, store):
    path = table(tmp_path / "x.parquet", image=padded(200), label=LABELS)
    assert run(path, store).counts["accepted"] == COUNT
    table(tmp_path / "x.parquet", image=padded(200), other=padded(200), label=LABELS)
    with pytest.raises(ValueError, match=r"2 of the columns .* can hold images \(image, other\)"):
        list_source(str(path))


@pytest.mark.parametrize(
    ("name", "column", "message"),
    [
        (
            "image",
            [[image] for image in IMAGES],
            "column 'image' is of type list<element: binary>, and one image as bytes",
        ),
        (
            "image",
            [{"height": 1}] * 8,
            "column 'image' is of type struct<height: int64>, and one image as bytes, or one",
        ),
        ("pixels", [[1, 2]] * 8, "has the columns pixels, label, of which none holds images or paths: name the column"),
    ],
)
def test_types_that_are_no_images_are_refused(refusal, tmp_path, name, column, message):
    table(tmp_path / "x.parquet", **{name: column, "label": LABELS})
    assert message in refusal(tmp_path / "x.parquet")
    assert "no column holds images as bytes (" in refusal(f"parquet:{tmp_path}/x.parquet")
    stated = refusal(tmp_path / "x.parquet", "--set", f"data.image_column={name}")
    assert f"column {name!r} is of type" in stated


def test_files_of_other_types_than_the_first_are_refused(tmp_path, store):
    table(tmp_path / "a.parquet", image=IMAGES, label=LABELS)
    table(tmp_path / "b.parquet", image=[[1]] * COUNT, label=LABELS)
    with pytest.raises(ValueError, match=r"b.parquet has no images in column 'image': give files of one kind"):
        run(tmp_path, store)


# --- base64


@pytest.mark.parametrize(
    "texts",
    [
        TEXTS,
        [f"data:image/png;base64,{text}" for text in TEXTS],
        [base64.encodebytes(image).decode() for image in IMAGES],
        [base64.urlsafe_b64encode(image).decode().rstrip("=") for image in IMAGES],
    ],
)
def test_images_in_base64_are_read_from_parquet(tmp_path, store, texts):
    assert labels(table(tmp_path / "x.parquet", image=texts, label=LABELS), store.at("a")) == [0, 1] * 4
    path = table(tmp_path / "y.parquet", thumbnail=IMAGES[::-1], full=texts, label=LABELS)
    assert labels(path, store.at("b"), image_column="full") == [0, 1] * 4


def test_text_among_base64_that_is_no_image_is_told(tmp_path, store):
    table(
        tmp_path / "x.parquet",
        image=[*TEXTS, "img/1.png", None, TEXTS[0][:-9] + "%"],
        label=[*LABELS, "cat", "cat", "dog"],
    )
    run(tmp_path / "x.parquet", store)
    assert reasons(store) == {
        "x.parquet#8": "its text is no image in base64",
        "x.parquet#9": "no bytes",
        "x.parquet#10": "its text is no image in base64",
    }


# --- paths of an index


def test_paths_that_no_file_can_have_are_told_shortened(tmp_path, store):
    long = base64.b64encode(bytes(3000)).decode()
    image = base64.b64encode(IMAGES[0] * 9).decode()
    odd = ["a\0b.png", f"{long[:300]}/x.png", f"img/{long}", image, "http://me:secret@host/x.png", "s3://B/x.png"]
    table(pictures(tmp_path) / "i.parquet", path=[*PATHS, *odd], label=[*LABELS, *["cat"] * len(odd)])
    prepared = run(tmp_path / "i.parquet", store)
    told = reasons(store)
    assert (prepared.counts["accepted"], prepared.counts["found"]) == (COUNT, COUNT + len(odd))
    assert {path.partition(":")[0]: reason for path, reason in told.items()} == {
        "row 8": "its path holds a NUL character",
        "row 9": "a part of its path has 300 bytes, more than 255",
        "row 10": "a part of its path has 4000 bytes, more than 255",
        "row 11": "its path is an image in base64: of text, images are read in Parquet only",
        "row 12": "its path http://...: neither a local path nor on S3; give a path or s3:// URI",
        "row 13": told["row 13: 's3://B/x.png'"],
    }
    assert "not a bucket name" in told["row 13: 's3://B/x.png'"]
    assert all(len(path) < 130 and "secret" not in path for path in told)


def several_ways(root: Path) -> Path:
    """An index whose paths are right, but for the last one, and some the same."""
    paths = [" img/0.png", "./img/1.png", "img/../img/2.png", "img//3.png", "img/4.png ", *PATHS[5:], "img/\u00e9.png"]
    again = ["img/1.png", "./img/../img/2.png", "../../../../x.png"]
    write_files(pictures(root), {"img/e\u0301.png": image_bytes(50)})
    return table(root / "i.parquet", path=[*paths, *again], label=[*LABELS, *LABELS[:4]])


def rows_and_reasons(uri: object, store: Store) -> tuple[dict[str, bytes], dict[str, str]]:
    rows = rows_of(store, run(uri, store))
    return {row["image_id"]: row["image"]["bytes"] for row in rows}, reasons(store)


def test_rows_may_write_paths_in_several_ways(tmp_path, store):
    rows, told = rows_and_reasons(several_ways(tmp_path / "a/b/c/d"), store)
    assert rows == {
        **{path: IMAGES[number] for number, path in enumerate(PATHS) if number > 4},
        " img/0.png": IMAGES[0],
        "./img/1.png": IMAGES[1],
        "./img/../img/2.png": IMAGES[2],
        "img//3.png": IMAGES[3],
        "img/4.png ": IMAGES[4],
        "img/\u00e9.png": image_bytes(50),
    }
    same = "another entry has the same name"
    assert told == {"img/1.png": same, "img/../img/2.png": same, "../../../../x.png": "there is no such file"}


@pytest.mark.s3
def test_paths_on_s3_mean_what_they_mean_on_disk(tmp_path, store, s3_env):
    rows, told = rows_and_reasons(several_ways(tmp_path / "a/b/c/d"), store.at("disk"))
    path = "../../../../x.png"
    told[f"row 11: {path!r}"] = told.pop(path).replace("there is no such file", "its path leads out of the bucket")
    assert rows_and_reasons(f"{upload(tmp_path / 'a/b/c/d')}/i.parquet", store.at("s3")) == (rows, told)
    root = upload(tmp_path / "a")
    far = [f"{root}/b/c/d/{path}" for path in PATHS[:4]]
    table(tmp_path / "a/b/c/d/i.parquet", path=[*far, *PATHS[4:]], label=LABELS)
    rows, _ = rows_and_reasons(tmp_path / "a/b/c/d/i.parquet", store.at("far"))
    assert rows == dict(zip([*far, *PATHS[4:]], IMAGES, strict=True))
    table(tmp_path / "a/b/i.parquet", path=[f"../b/c/d/{path}" for path in PATHS], label=LABELS)
    rows, _ = rows_and_reasons(f"{upload(tmp_path / 'a')}/b/i.parquet", store.at("inside"))
    assert rows == {f"../b/c/d/{path}": image for path, image in zip(PATHS, IMAGES, strict=True)}
