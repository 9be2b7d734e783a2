import contextlib
import hashlib
import io
import json
import os
import random
import re
import sys
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import infra.codes.contract
from flows.cli.main import main
from flows.pipeline import graph
from infra.artifacts.manifest import folder_of, manifest_of
from infra.codes.contract import CodeRows, CodesInfo, from_parquet, load_codes, load_info, read_codes, to_parquet
from infra.store.store import Store
from tests.support import ROOT
from tests.support.codes_info import codes_info
from tests.support.small_dataset import Made, draw_images

INFO = codes_info(300, 5, tokenizer="0123abcd", image_size=32, class_names=("kōala", 'a "b"\n', "c"))


def rows_of(count: int, info: CodesInfo = INFO, seed: int = 0) -> CodeRows:
    draw = np.random.default_rng(seed)
    return CodeRows(
        [f"train/é <b>'\"\n{number // 2:05d}.png" for number in range(count)],
        draw.integers(-1, 3, count).astype(np.int32),
        [("center", "affine-1")[number % 2] for number in range(count)],
        draw.integers(0, info.codebook_size, (count, info.num_tokens)).astype(info.dtype),
    )


def pick(rows: CodeRows, order: list[int]) -> CodeRows:
    return CodeRows(
        [rows.image_id[row] for row in order],
        rows.class_id[order],
        [rows.variant[row] for row in order],
        rows.codes[order],
    )


def table_of(rows: CodeRows) -> dict[tuple[str, str], tuple[int, tuple[int, ...]]]:
    return {
        (image_id, variant): (int(class_id), tuple(codes.tolist()))
        for image_id, class_id, variant, codes in zip(*rows, strict=True)
    }


@pytest.mark.parametrize(
    ("codebook_size", "dtype"), [(2, "uint16"), (65_536, "uint16"), (65_537, "uint32"), (1 << 20, "uint32")]
)
def test_what_is_written_is_read(codebook_size, dtype):
    info = INFO.model_copy(update={"codebook_size": codebook_size})
    rows = rows_of(200, info)
    rows.codes[0, 0] = codebook_size - 1
    read_info, read = from_parquet(to_parquet(info, rows))
    assert read_info == info
    assert read.codes.dtype == dtype
    assert read.class_id.dtype == np.int32
    assert table_of(read) == table_of(rows)
    keys = list(zip(read.image_id, read.variant, strict=True))
    assert keys == sorted(keys)
    read.codes[0] = 0  # the reader's own memory: torch refuses to share read-only arrays


def test_no_rows_are_rows():
    info, rows = from_parquet(to_parquet(INFO, rows_of(0)))
    assert info == INFO
    assert rows.codes.shape == (0, 5)
    assert rows.class_id.shape == (0,)


def test_several_row_groups_are_read_whole(monkeypatch):
    monkeypatch.setattr("infra.codes.contract._ROWS_PER_GROUP", 64)
    rows = rows_of(200)
    data = to_parquet(INFO, rows)
    assert pq.read_metadata(io.BytesIO(data)).num_row_groups == 4
    assert table_of(from_parquet(data)[1]) == table_of(rows)


def test_equal_rows_in_any_order_make_equal_bytes():
    rows = rows_of(300)
    order = list(range(300))
    random.Random(0).shuffle(order)
    one, other = to_parquet(INFO, rows), to_parquet(INFO, pick(rows, order))
    assert hashlib.sha256(one).digest() == hashlib.sha256(other).digest()


def test_sampling_settings_travel_with_samples():
    info = INFO.model_copy(
        update={"sampling": {"cfg_scale": 1.5, "seed": 3, "top_k": None, "nested": {"b": [1, 2], "a": "é"}}}
    )
    assert from_parquet(to_parquet(info, rows_of(3)))[0] == info


def test_a_file_may_carry_notes_of_its_own(store):
    """Additional metadata of a file does not make it part of another dataset."""
    store.write("a.parquet", to_parquet(INFO, rows_of(4)))
    store.write("b.parquet", to_parquet(INFO, rows_of(4), {"sftok.failed": '["é"]'}))
    assert pq.read_schema(store.path / "b.parquet").metadata[b"sftok.failed"].decode() == '["é"]'
    assert read_codes(store, ["a.parquet", "b.parquet"])[0] == load_codes(store, ["b.parquet"])[0] == INFO
    assert to_parquet(INFO, rows_of(4), {}) == store.read("a.parquet")


def test_schema_is_the_contract():
    schema = pq.read_schema(io.BytesIO(to_parquet(INFO, rows_of(3))))
    assert {field.name: str(field.type) for field in schema} == {
        "image_id": "string",
        "class_id": "int32",
        "variant": "string",
        "codes": "fixed_size_list<element: uint16 not null>[5]",
    }
    metadata = json.loads(schema.metadata[b"sftok"])
    assert metadata["tokenizer"] == "0123abcd"
    assert metadata["class_names"] == list(INFO.class_names)
    assert set(metadata) == set(CodesInfo.model_fields)


def test_rows_of_64_codes_take_little_more_than_their_bits():
    # 64 codes of 13 bits are 104 bytes; image ids are counted too
    info = INFO.model_copy(update={"codebook_size": 8192, "num_tokens": 64})
    assert len(to_parquet(info, rows_of(20_000, info))) / 20_000 < 112


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "codes.parquet"
    path.write_bytes(to_parquet(INFO, rows_of(40)))
    return path


def test_duckdb_opens_it(path):
    rows = from_parquet(path.read_bytes())[1]
    read = duckdb.sql(f"select image_id, class_id, variant, codes from '{path}' order by image_id, variant").fetchall()
    assert [(image_id, variant) for image_id, _, variant, _ in read] == list(
        zip(rows.image_id, rows.variant, strict=True)
    )
    assert [list(codes) for *_, codes in read] == rows.codes.tolist()
    assert [-1 if class_id is None else class_id for _, class_id, _, _ in read] == rows.class_id.tolist()
    assert duckdb.sql(f"select max(codes[1]) from '{path}'").fetchall() == [(int(rows.codes[:, 0].max()),)]


def test_pandas_opens_it(path):
    rows, frame = from_parquet(path.read_bytes())[1], pd.read_parquet(path)
    assert frame["image_id"].tolist() == rows.image_id
    assert np.array_equal(np.stack(frame["codes"]), rows.codes)
    assert frame["class_id"].isna().sum() == (rows.class_id == -1).sum() > 0


def test_pyarrow_and_polars_open_it(path):
    rows = from_parquet(path.read_bytes())[1]
    assert pq.read_table(path)["codes"].to_pylist() == rows.codes.tolist()
    assert np.array_equal(pl.read_parquet(path)["codes"].to_numpy(), rows.codes)


def test_hugging_face_opens_it(path, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset("parquet", data_files=str(path), cache_dir=str(tmp_path / "cache"))["train"]
    rows = from_parquet(path.read_bytes())[1]
    assert loaded["image_id"][:] == rows.image_id
    assert np.array_equal(np.array(loaded.with_format("numpy")["codes"][:]), rows.codes)


def test_files_are_read_together_in_the_order_of_their_names(store):
    rows = rows_of(50)
    store.write("b.parquet", to_parquet(INFO, pick(rows, list(range(30)))))
    store.write("a.parquet", to_parquet(INFO, pick(rows, list(range(30, 50)))))
    info, read = read_codes(store, ["b.parquet", "a.parquet"])
    assert info == INFO
    assert table_of(read) == table_of(rows)
    assert read.image_id[:30] == sorted(rows.image_id[:30])


def test_files_of_two_tokenizers_do_not_mix(store):
    store.write("a.parquet", to_parquet(INFO, rows_of(4)))
    store.write("b.parquet", to_parquet(INFO.model_copy(update={"tokenizer": "other"}), rows_of(4)))
    with pytest.raises(ValueError, match=r"tokenizer is '0123abcd' in a.parquet and 'other' in b.parquet"):
        read_codes(store, ["a.parquet", "b.parquet"])
    with pytest.raises(ValueError, match="no code files"):
        read_codes(store, [])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codes": np.full((4, 5), 300, dtype=np.uint16)}, "codes from 300 to 300 are not within codebook_size = 300"),
        ({"codes": np.full((4, 5), -1)}, "codes from -1 to -1 are not within"),
        ({"codes": np.full((4, 5), 65_536 + 7)}, "codes from 65543"),
        ({"codes": np.zeros((4, 6), dtype=np.uint16)}, r"shape \(4, 6\) do not fit"),
        ({"class_id": np.full(4, 3, dtype=np.int32)}, "class ids from 3 to 3 are not within 3 class names"),
        ({"class_id": np.full(4, -2, dtype=np.int32)}, "class ids from -2"),
        ({"class_id": np.zeros(3, dtype=np.int32)}, "3 classes"),
        ({"image_id": ["x"] * 4, "variant": ["center"] * 4}, "'center' comes twice"),
    ],
)
def test_rows_that_break_the_contract_are_not_written(changes, message):
    with pytest.raises(ValueError, match=message):
        to_parquet(INFO, rows_of(4)._replace(**changes))


def test_codes_beyond_the_codebook_are_not_read():
    table = pq.read_table(io.BytesIO(to_parquet(INFO, rows_of(40))))
    smaller = INFO.model_copy(update={"codebook_size": 10}).model_dump_json().encode()
    with pytest.raises(ValueError, match=r"x.parquet: codes from \d+ to \d+ are not within codebook_size = 10"):
        from_parquet(written(table.replace_schema_metadata({b"sftok": smaller})), "x.parquet")


def written(table: pa.Table) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


def test_other_files_are_refused_by_name(store):
    table = pq.read_table(io.BytesIO(to_parquet(INFO, rows_of(4))))
    unknown = json.dumps({**INFO.as_json(), "colour": "red"}).encode()
    others = {
        "is not Parquet": b"PAR1, or so it says",
        "has no metadata key 'sftok'": written(table.replace_schema_metadata(None)),
        "colour": written(table.replace_schema_metadata({b"sftok": unknown})),
        "not code Parquet": written(table.drop_columns(["variant"])),
    }
    for message, data in others.items():
        store.write("x.parquet", data)
        with pytest.raises(ValueError, match=message) as caught:
            read_codes(store, ["x.parquet"])
        assert "x.parquet" in str(caught.value)


def test_truncated_files_are_refused(tmp_path):
    store = Store(tmp_path)
    data = to_parquet(INFO, rows_of(400))
    store.write("x.parquet", data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"x.parquet is not Parquet"):
        read_codes(store, ["x.parquet"])


def test_no_changed_byte_escapes_as_an_error_of_arrow():
    """Guards against damage that Arrow reports as an OSError, which flows would treat as an unavailable store."""
    data = to_parquet(INFO, rows_of(600))
    refused = 0
    for at in range(0, len(data), 41):
        broken = bytearray(data)
        broken[at] ^= 0x55
        with contextlib.suppress(ValueError):  # some changes give other codes that are as good
            from_parquet(bytes(broken), "x.parquet")
            refused -= 1
        refused += 1
    assert refused > 20


# --- loading into arrays ---------------------------------------------------------------------------------------------


def shards(store: Store, rows: CodeRows, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Write the rows to three files of several row groups."""
    monkeypatch.setattr("infra.codes.contract._ROWS_PER_GROUP", 64)
    names, cuts = ["c.parquet", "a.parquet", "b.parquet"], [0, 150, 151, len(rows.image_id)]
    for name, first, last in zip(names, cuts, cuts[1:], strict=False):
        store.write(name, to_parquet(INFO, pick(rows, list(range(first, last)))))
    return names


def test_loaded_arrays_are_what_is_read(store, monkeypatch):
    rows = rows_of(400)
    names = shards(store, rows, monkeypatch)
    info, read = read_codes(store, names)
    loaded_info, loaded = load_codes(store, names, with_ids=True)
    assert loaded_info == info == load_info(store, "a.parquet")
    assert np.array_equal(loaded.codes, read.codes)
    assert loaded.codes.dtype == np.uint16
    assert loaded.codes.flags.c_contiguous
    assert loaded.codes.flags.writeable, "torch refuses to share read-only arrays"
    assert np.array_equal(loaded.class_id, read.class_id)
    assert loaded.image_id.to_pylist() == read.image_id
    assert loaded.variant.to_pylist() == read.variant
    assert len({tuple(chunk.dictionary.to_pylist()) for chunk in loaded.variant.chunks}) == 1
    bare = load_codes(store, names)[1]
    assert (bare.image_id, bare.variant) == (None, None)
    assert np.array_equal(bare.codes, read.codes)


def test_empty_files_are_loaded(store):
    store.write("a.parquet", to_parquet(INFO, rows_of(0)))
    store.write("b.parquet", to_parquet(INFO, rows_of(3)))
    assert load_codes(store, ["a.parquet"])[1].codes.shape == (0, 5)
    assert load_codes(store, ["a.parquet"], with_ids=True)[1].image_id.to_pylist() == []
    assert load_codes(store, ["a.parquet", "b.parquet"])[1].codes.shape == (3, 5)


def test_loading_holds_a_row_group_beside_the_array(store):
    info = INFO.model_copy(update={"codebook_size": 8192, "num_tokens": 64})
    names = [f"{number}.parquet" for number in range(4)]
    for number, name in enumerate(names):
        store.write(name, to_parquet(info, rows_of(40_000, info, seed=number)))
    before, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(pool)
    try:
        codes = load_codes(store, names)[1].codes
    finally:
        pa.set_memory_pool(before)
    group = infra.codes.contract._ROWS_PER_GROUP * 64 * 2
    assert codes.nbytes == 4 * 40_000 * 64 * 2
    assert 0 < pool.max_memory() < 8 * group < codes.nbytes
    assert pool.bytes_allocated() == 0, "nothing of Arrow's should be left"


def test_damage_is_named_when_loading(store, monkeypatch):
    names = shards(store, rows_of(400), monkeypatch)
    data = store.read("b.parquet")
    for broken in (data[:-100], data[: len(data) // 3], b""):
        store.write("b.parquet", broken)
        with pytest.raises(ValueError, match=r"b\.parquet is not Parquet"):
            load_codes(store, names)
    store.write("b.parquet", to_parquet(INFO.model_copy(update={"precision": "bf16"}), rows_of(3)))
    with pytest.raises(ValueError, match=r"precision is 'fp32' in c\.parquet and 'bf16' in b\.parquet"):
        load_codes(store, names)
    smaller = pq.read_table(io.BytesIO(data)).replace_schema_metadata(
        {b"sftok": INFO.model_copy(update={"codebook_size": 10}).model_dump_json().encode()}
    )
    store.write("d.parquet", written(smaller))
    with pytest.raises(ValueError, match=r"d\.parquet: codes from \d+ to \d+ are not within codebook_size = 10"):
        load_codes(store, ["d.parquet"])
    with pytest.raises(FileNotFoundError, match=r"none\.parquet"):
        load_codes(store, ["c.parquet", "none.parquet"])
    with pytest.raises(ValueError, match="no code files"):
        load_codes(store, [])


# --- the examples of the contract ------------------------------------------------------------------------------------

CONTRACT = (ROOT / "docs" / "reference" / "codes.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", CONTRACT, flags=re.DOTALL)


@pytest.fixture(scope="module")
def encoded(tmp_path_factory) -> Store:
    """Make a code dataset with the encode stage."""
    place = tmp_path_factory.mktemp("encoded")
    draw_images(place / "source")
    made = Made(Store(place / "store"), place / "source")
    ref = made.run(graph.ENCODE, images=made.run(graph.PREPARE), tokenizer=made.tokenizer(0))
    return folder_of(made.store, ref.kind, ref.digest)


def test_every_reader_has_an_example():
    imported = " ".join(EXAMPLES)
    assert all(f"import {name}" in imported for name in ("duckdb", "polars", "pandas", "torch", "pyarrow.dataset"))
    assert "from datasets import" in imported


@pytest.mark.parametrize("example", EXAMPLES, ids=[re.findall(r"\w+", text)[-1] for text in EXAMPLES])
def test_examples_give_what_was_encoded(example, encoded, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    info, train = read_codes(encoded, [name for name in encoded.list("train-") if name.endswith(".parquet")])
    _, val = read_codes(encoded, [name for name in encoded.list("val-") if name.endswith(".parquet")])
    scope = {"folder": encoded.uri}
    exec(compile(example, "codes.md", "exec"), scope)
    is_center = np.array(train.variant) == "center"
    if "codes" in scope:
        expected = train.codes[is_center] if "center" in example else train.codes
        assert scope["codes"].tolist() == expected.tolist()
        assert str(scope["codes"].dtype).endswith("uint16")
    else:
        assert scope["images"] == len({*train.image_id, *val.image_id})
        assert scope["used"] == len(np.unique(np.concatenate([train.codes, val.codes])))
        assert next(iter(scope["first"].values())).tolist() == train.codes[is_center, 0].tolist()
    if isinstance(scope.get("info"), dict):
        assert scope["info"] == info.as_json()
    if "batch" in scope:
        assert scope["batch"].shape == (32, info.num_tokens)


def run_cli(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return int(ended.value.code or 0)


def test_files_that_lie_with_another_version_are_listed(tmp_path, capsys):
    """Globs miss shared shards: a dataset with one more image reuses the other shards of the earlier one."""
    draw_images(tmp_path / "source")
    made = Made(Store(tmp_path / "store"), tmp_path / "source")
    tokenizer = made.tokenizer(0)
    first = made.run(graph.ENCODE, images=made.run(graph.PREPARE), tokenizer=tokenizer)
    draw_images(tmp_path / "source", 21)
    second = made.run(graph.ENCODE, images=made.run(graph.PREPARE), tokenizer=tokenizer)
    manifest = manifest_of(made.store, second)
    assert 0 < manifest.counts["reused"] < manifest.counts["shards"]
    for split in ("train", "val"):
        assert run_cli("files", f"codes/{second.digest}", "--split", split, "--store", made.store.uri) == 0
        listed = capsys.readouterr().out.splitlines()
        names = [name.removeprefix(f"{made.store.uri}/") for name in listed]
        assert len(names) == {"train": 3, "val": 2}[split]
        _, rows = read_codes(made.store, names)
        assert len({*rows.image_id}) == manifest_of(made.store, manifest.inputs["images"]).counts[split]
    whole = f"{made.store.uri}/artifacts/codes/{first.digest}"
    assert run_cli("files", whole, "--json") == 0
    assert len(json.loads(capsys.readouterr().out)) == 5
    assert run_cli("files", whole, "--split", "test") == 2
    assert "has no split 'test': it has the splits train, val" in capsys.readouterr().err


def test_the_contract_names_every_column_and_field():
    schema = pq.read_schema(io.BytesIO(to_parquet(INFO, rows_of(1))))
    for name in (*schema.names, *CodesInfo.model_fields):
        assert f"| `{name}` |" in CONTRACT
