"""The rules of docs/reference/sources.md hold for each kind of source, on disk and on S3."""

import csv
import io
import json
import logging
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.store.store import Store
from sftok.prepare.prepare import prepare
from sftok.sources.class_ids import distinct
from sftok.sources.rules import HIDDEN_FILE, HIDDEN_FOLDER, STRAY_FILE, SYSTEM_FOLDER
from sftok.sources.sources import list_source
from tests.support.image_sources import CONFIG, hf_schema, image_bytes, reasons, rows_of, tar_bytes, upload, write_files

KINDS = {"folder": "", "webdataset": ".tar", "parquet": ".parquet", "index": ""}  # with the suffix of containers
NFC, NFD = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))


class Expected(NamedTuple):
    rows: Mapping[str, str]  # file name, or whole id if it has a #: split and label
    classes: tuple[str, ...] = ("cat", "dog")
    rejected: Mapping[str, str] = {}
    remarks: int = 0  # on Unicode


class Rule(NamedTuple):
    name: str
    rows: Sequence[str]  # SPLIT/CLASS/NAME, one image each
    expected: Expected
    but: Mapping[str, Mapping[str, object]] = {}  # of kinds that differ
    names: Sequence[str] = ()  # of the classes, whose ids are in the rows
    others: Sequence[str] = ()  # files beside the images; {} is the suffix of tars or Parquet files, if there are any


def four(first: str = "cat", second: str = "dog", train: str = "train", val: str = "val") -> list[str]:
    return [f"{train}/{first}/1.png", f"{train}/{second}/2.png", f"{val}/{first}/3.png", f"{val}/{second}/4.png"]


def four_rows(first: int = 0, second: int = 1) -> dict[str, str]:
    return {"1.png": f"train {first}", "2.png": f"train {second}", "3.png": f"val {first}", "4.png": f"val {second}"}


FOUR = Expected(four_rows())
HIDDEN = {"train/cat/.checkpoints/": HIDDEN_FOLDER, "train/cat/.h.png": HIDDEN_FILE, "train/cat/@eaDir/": SYSTEM_FOLDER}
HIDDEN_TARS = {"train/.checkpoints/": HIDDEN_FOLDER, "train/.h.tar": HIDDEN_FILE, "train/@eaDir/": SYSTEM_FOLDER}
RULES = [
    Rule("split names in any case", four(train="Train", val="VALIDATION"), FOUR),
    Rule("equal class names", four("0", "1"), FOUR._replace(classes=("a", "a (#1)")), names=("a", "a")),
    Rule(
        "order of numbers",
        four("2", "10"),
        Expected(four_rows(2, 10), tuple(map(str, range(11)))),
        {"folder": {"rows": four_rows(), "classes": ("2", "10")}},
    ),
    Rule(
        "hidden files",
        [*four(), "train/cat/.checkpoints/5.png", "train/cat/.h.png", "train/cat/@eaDir/6/THUMB.jpg"],
        Expected(four_rows() | dict.fromkeys(("5.png", ".h.png", "THUMB.jpg"), "train 0")),
        {
            "folder": {"rows": four_rows(), "rejected": HIDDEN},
            "webdataset": {"rows": four_rows(), "rejected": {**HIDDEN, **HIDDEN_TARS, "train/cat/.h.cls": HIDDEN_FILE}},
            "parquet": {"rejected": {path.replace(".tar", ".parquet"): why for path, why in HIDDEN_TARS.items()}},
        },
        others=["train/.checkpoints/x{}", "train/.h{}", "train/@eaDir/x/THUMB{}"],
    ),
    Rule(
        "stray files",
        four(),
        FOUR._replace(rejected={"train/readme.txt": STRAY_FILE}),
        {"index": {"rejected": {}}},
        others=["train/readme.txt"],
    ),
    Rule(
        "duplicates",
        [*four(), "train/cat/1.png"],
        FOUR,
        {
            "webdataset": {"rejected": {"train/cat/1.png": "the tar holds a member of this name before"}},
            "parquet": {
                "rows": {f"train/0.parquet#{row}": f"train {row % 2}" for row in range(3)}
                | {f"val/0.parquet#{row}": f"val {row}" for row in range(2)}
            },
            "index": {"rejected": {"train/cat/1.png": "another entry has the same name"}},
        },
    ),
    Rule(
        "Unicode",
        [f"train/{NFC}/1.png", f"val/{NFD}/2.png"],
        Expected({"1.png": "train 0", "2.png": "val 0"}, (NFC,), remarks=1),
    ),
    Rule(
        "images without a label",
        [*four(), "train//5.png"],
        FOUR._replace(rejected={"train/5.png": "it has no label"}),
        {"folder": {"rejected": {"train/5.png": "not in a class folder"}}},
    ),
]


def build(kind: str, root: Path, rule: Rule) -> str:
    """Write the rows of a rule as a source of the kind; the source's path below `root`."""
    splits: dict[str, list[tuple[str, str, str, bytes]]] = {}  # label, name, path, image
    for number, row in enumerate(rule.rows):
        split, label, name = row.split("/", 2)
        folder = distinct(rule.names)[int(label)] if rule.names and kind == "folder" else label
        path = f"{folder}/{name}".removeprefix("/")
        splits.setdefault(split, []).append((label, name, path, image_bytes(number)))
        if kind in ("folder", "index"):
            write_files(root, {f"{split}/{path}": image_bytes(number)})
    if kind == "index":
        table = [(f"{split}/{path}", label, split) for split, rows in splits.items() for label, _, path, _ in rows]
        with (root / "index.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("path", "label", "split"), *table])
        return "/index.csv"
    for split, rows in splits.items() if kind != "folder" else ():
        sink = io.BytesIO()
        if kind == "parquet":
            schema = hf_schema(list(rule.names)) if rule.names else hf_schema([]).set(1, pa.field("label", pa.string()))
            cells = [
                {"image": {"bytes": data, "path": f"{split}/{path}"}, "label": int(label) if rule.names else label}
                for label, _, path, data in rows
            ]
            pq.write_table(pa.Table.from_pylist(cells, schema=schema), sink)
        else:
            members = [(path, data) for _, _, path, data in rows]
            members += [(f"{path[:-4]}.cls", label.encode()) for label, _, path, _ in rows if label]
            sink.write(tar_bytes(members))
        write_files(root, {f"{split}/0{KINDS[kind]}": sink.getvalue()})
    return ""


@pytest.mark.parametrize("place", ["disk", pytest.param("s3", marks=pytest.mark.s3)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES, ids=[rule.name for rule in RULES])
def test_each_kind_follows_each_rule(rule, kind, place, tmp_path, store, request, caplog):
    root, expected = tmp_path / "data", rule.expected._replace(**rule.but.get(kind, {}))
    name = build(kind, root, rule)
    config = CONFIG
    if rule.names and kind != "parquet":  # whose schema has the names
        (tmp_path / "names").write_text("\n".join(rule.names))
        config = CONFIG.model_copy(update={"class_names_file": str(tmp_path / "names")})
    if rule.others:
        plain = prepare(list_source(f"{root}{name}", config), config, out=store.at("plain"))
    others = [path.format(KINDS[kind]) for path in rule.others if KINDS[kind] or "{}" not in path]
    write_files(root, dict.fromkeys(others, b"other"))
    if place == "s3":
        request.getfixturevalue("s3_env")
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        source = list_source(f"{upload(root) if place == 's3' else root}{name}", config)
        prepared = prepare(source, config, out=store.at("whole"))
    out = store.at("whole")
    rows = {row["image_id"]: f"{row['split']} {row['label']}" for row in rows_of(out, prepared)}
    assert {
        path if ".parquet#" in path else path.rpartition("/")[2]: row for path, row in rows.items()
    } == expected.rows
    assert {path.replace("/0.tar", ""): reason for path, reason in reasons(out).items()} == expected.rejected
    assert classes_of(out) == expected.classes
    assert prepared.counts["found"] == len(expected.rows) + len(expected.rejected)
    assert sum("Unicode" in told for told in (*source.remarks, *caplog.messages)) == expected.remarks
    assert not rule.others or prepared.content_digest == plain.content_digest, "what is not read changes nothing"


@pytest.mark.parametrize("place", ["disk", pytest.param("s3", marks=pytest.mark.s3)])
@pytest.mark.parametrize("kind", KINDS)
def test_two_names_of_one_split_are_refused(kind, place, tmp_path, request):
    root = tmp_path / "data"
    name = build(kind, root, Rule("two names", [*four(), "validation/cat/5.png"], FOUR))
    if place == "s3":
        request.getfixturevalue("s3_env")
    with pytest.raises(ValueError, match="named val and validation, which are one split: merge or rename them"):
        list_source(f"{upload(root) if place == 's3' else root}{name}", CONFIG)


def classes_of(store: Store) -> tuple[str, ...]:
    schema = pq.read_schema(io.BytesIO(store.read("train-00000-of-00003.parquet")))
    return tuple(json.loads(schema.metadata[b"sftok"])["class_names"])


@pytest.mark.parametrize("form", [NFC, NFD])
@pytest.mark.parametrize("kind", KINDS)
def test_stated_names_match_in_either_form_of_unicode(kind, form, tmp_path, store, caplog):
    rule = Rule("", [f"train/{NFC}/1.png", "train/b/2.png", f"val/{NFD}/3.png", "val/b/4.png"], FOUR)
    uri = f"{tmp_path}/data{build(kind, tmp_path / 'data', rule)}"
    (tmp_path / "names").write_text(f"{form}\nb\n")
    config = CONFIG.model_copy(update={"class_names_file": str(tmp_path / "names")})
    source = list_source(uri, config)
    prepared = prepare(source, config, out=store)
    labels = {row["image_id"].rpartition("/")[2]: row["label"] for row in rows_of(store, prepared)}
    assert (labels, classes_of(store)) == ({"1.png": 0, "2.png": 1, "3.png": 0, "4.png": 1}, (NFC, "b"))
    (told,) = [text for text in (*source.remarks, *caplog.messages) if "Unicode" in text]
    assert f"the class name {NFC!r} is written in decomposed Unicode: taken for the composed form" in told
