"""`sftok verify` against artifacts that the stages made: whole ones pass, and every way of breaking one is named."""

import hashlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows.cli.main import main
from flows.pipeline import graph
from flows.store.verify import Verification, verify
from infra.artifacts.manifest import MANIFEST, ArtifactRef, folder_of, manifest_of
from infra.artifacts.shards import put
from infra.codes.contract import CodesInfo, from_parquet, to_parquet
from infra.store.store import Store
from tests.support.small_dataset import Made, draw_images

TRAIN, VAL = "train-00001-of-00003.parquet", "val-00000-of-00002.parquet"
SAMPLES = "sample-00000-of-00002.parquet"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Made, dict[str, ArtifactRef]]:
    place = tmp_path_factory.mktemp("whole")
    draw_images(place / "source")
    made = Made(Store(place / "store"), place / "source")
    refs = {"images": made.run(graph.PREPARE), "tokenizer": made.tokenizer(0)}
    refs["codes"] = made.run(graph.ENCODE, **refs)
    refs["generator"] = made.generator(refs["codes"])
    refs["samples"] = made.run(graph.SAMPLE, generator=refs["generator"])
    return made, refs


class Copy:
    """A copy of the store to break."""

    def __init__(self, store: Store, refs: dict[str, ArtifactRef]) -> None:
        self.store, self.refs = store, refs

    def folder(self, kind: str) -> Store:
        return folder_of(self.store, kind, self.refs[kind].digest)

    def verify(self, kind: str, *, inputs: bool = False) -> Verification:
        return verify(str(self.refs[kind]), store=self.store.uri, inputs=inputs)

    def findings(self, kind: str) -> list[str]:
        return [str(finding) for finding in self.verify(kind).artifacts[0].findings]

    def set_manifest(self, kind: str, **changes: object) -> None:
        manifest = manifest_of(self.store, self.refs[kind])
        self.folder(kind).write(MANIFEST, manifest.model_copy(update=changes).model_dump_json().encode())

    def rewrite(self, kind: str, name: str, data: bytes, length: int, /, **counts: int) -> None:
        """As a stage with a mistake would have written it: file, sidecar and manifest fit each other."""
        manifest = manifest_of(self.store, self.refs[kind])
        entry = put(self.folder(kind), name, data, length)
        self.folder(kind).write(f"{name}.json", entry.model_dump_json().encode())
        files = tuple(sorted([*(e for e in manifest.files if e.path != name), entry], key=lambda e: e.path))
        self.set_manifest(kind, files=files, counts={**manifest.counts, **counts})

    def table(self, kind: str, name: str) -> pa.Table:
        return pq.read_table(io.BytesIO(self.folder(kind).read(name)))

    def rewrite_table(self, kind: str, name: str, table: pa.Table, **counts: int) -> None:
        sink = io.BytesIO()
        pq.write_table(table, sink)
        self.rewrite(kind, name, sink.getvalue(), len(table), **counts)

    def rewrite_info(self, name: str, **changes: object) -> None:
        info, rows = from_parquet(self.folder("codes").read(name))
        other = CodesInfo.model_validate({**info.as_json(), **changes})
        self.rewrite("codes", name, to_parquet(other, rows), len(rows.image_id))


@pytest.fixture
def copy(whole, tmp_path) -> Copy:
    made, refs = whole
    shutil.copytree(made.store.path, tmp_path / "store")
    return Copy(Store(tmp_path / "store"), refs)


@pytest.fixture
def sftok(capsys):
    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        printed = capsys.readouterr()
        return ended.value.code, printed.out, printed.err

    return run


# --- whole -----------------------------------------------------------------------------------------------------------


def test_all_that_a_run_made_is_as_it_should_be(copy, sftok):
    code, out, err = sftok("verify", str(copy.refs["samples"]), "--store", copy.store.uri, "--inputs", "--json")
    result = json.loads(out)
    assert (code, result["ok"]) == (0, True), out
    kinds = [artifact["ref"].split("/")[0] for artifact in result["artifacts"]]
    assert kinds == ["samples", "generator", "codes", "images", "tokenizer"]
    proven = {kind: " ".join(artifact["proven"]) for kind, artifact in zip(kinds, result["artifacts"], strict=True)}
    assert "6 samples, 3 of each of 2 classes" in proven["samples"]
    assert "found 22 = accepted 20 + rejected 2" in proven["images"]
    train, val = (manifest_of(copy.store, copy.refs["images"]).counts[split] for split in ("train", "val"))
    assert f"20 images x variants = {2 * train + val} = {2 * train + val} rows + 0 failed" in proven["codes"]
    assert "verify, MiB: 1/1" in err, "no progress"


def test_workers_find_the_same(copy):
    copy.rewrite_table("images", TRAIN, images_table(copy, TRAIN, lambda rows: rows.append(rows[0])))
    copy.folder("codes").write(VAL, b"broken")
    copy.folder("samples").delete(SAMPLES)
    alone = verify(str(copy.refs["samples"]), store=copy.store.uri, inputs=True)
    shared = verify(str(copy.refs["samples"]), store=copy.store.uri, inputs=True, workers=2)
    assert shared == alone
    broken = [artifact.ref.partition("/")[0] for artifact in alone.artifacts if artifact.findings]
    assert broken == ["samples", "codes", "images"]


def test_without_inputs_only_the_one_named_is_read(copy):
    copy.folder("tokenizer").write("model.safetensors", b"broken")
    assert copy.verify("codes").ok
    broken = copy.verify("codes", inputs=True)
    assert [artifact.ref for artifact in broken.artifacts if artifact.findings] == [str(copy.refs["tokenizer"])]


def test_findings_are_lines_and_exit_code_1(copy, sftok):
    copy.folder("codes").delete(TRAIN)
    code, out, err = sftok("verify", f"{copy.folder('codes').uri}")
    assert code == 1
    assert f"  {TRAIN}: is missing; delete the artifact's folder and run again\n" in out
    assert "Traceback" not in err


def test_no_such_artifact_is_refused_in_a_line(copy, sftok):
    code, out, err = sftok("verify", "codes/ffff", "--store", copy.store.uri)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert str(copy.refs["codes"]) in err, "what there is should be named"
    code, _, err = sftok("verify", "/", "--store", copy.store.uri)
    assert (code, err.count("\n")) == (2, 1)


@pytest.mark.parametrize("command", ["verify", "diff"])
def test_help_shows_examples(sftok, command):
    code, out, _ = sftok(command, "--help")
    assert code == 0
    assert f"  sftok {command}" in out.partition("Examples:")[2]


@pytest.mark.s3
def test_artifacts_on_s3_are_verified_and_compared_there(whole, s3_store, sftok):
    made, refs = whole
    for key in made.store.list():
        s3_store.write(key, made.store.read(key))
    code, out, err = sftok("verify", f"{s3_store.uri}/artifacts/{refs['codes']}", "--inputs")
    assert code == 0, out + err
    code, out, err = sftok("diff", str(refs["codes"]), str(refs["codes"]), "--store", s3_store.uri, "--json")
    assert code == 0, err
    assert json.loads(out)["agreement"]["codes"] == 1
    s3_store.delete(f"artifacts/{refs['codes']}/{TRAIN}")
    code, out, _ = sftok("verify", str(refs["codes"]), "--store", s3_store.uri)
    assert code == 1
    assert f"{TRAIN}: is missing" in out


# --- bytes and manifests ---------------------------------------------------------------------------------------------


def test_one_changed_bit_is_found_wherever_it_is(copy):
    for kind in copy.refs:
        for entry in manifest_of(copy.store, copy.refs[kind]).files:
            data = copy.folder(kind).read(entry.path)
            if not data:
                continue
            broken = bytearray(data)
            broken[len(data) // 2] ^= 1
            copy.folder(kind).write(entry.path, bytes(broken))
            (finding,) = copy.findings(kind)
            assert finding.startswith(f"{entry.path}: its bytes differ from {MANIFEST}")
            copy.folder(kind).write(entry.path, data)


def test_lengths_sidecars_and_strays(copy):
    folder = copy.folder("codes")
    folder.write(TRAIN, folder.read(TRAIN)[:-7])
    folder.delete(f"{VAL}.json")
    folder.write("train-00003-of-00004.parquet", b"from another run")
    sidecar = json.loads(folder.read("train-00002-of-00003.parquet.json"))
    folder.write("train-00002-of-00003.parquet.json", json.dumps({**sidecar, "rows": 1}).encode())
    found = copy.findings("codes")
    assert len(found) == 4
    assert "train-00003-of-00004.parquet: lies in the folder, but" in found[0]
    assert f"{TRAIN}: has " in found[1]
    assert f"train-00002-of-00003.parquet.json: rows is 1, {MANIFEST} says {sidecar['rows']}" in found[2]
    assert f"{VAL}.json: is missing" in found[3]


def test_a_manifest_that_was_edited(copy):
    manifest = manifest_of(copy.store, copy.refs["tokenizer"])
    copy.set_manifest("tokenizer", config={"seed": 7})
    (finding,) = copy.findings("tokenizer")
    assert "manifest.json: config and inputs make the digest" in finding
    copy.folder("tokenizer").write(MANIFEST, b'{"kind": "tokenizer"')
    (finding,) = copy.findings("tokenizer")
    assert "manifest.json: cannot be read" in finding
    other = manifest.model_dump_json().replace(manifest.digest, "0" * 32).encode()
    copy.folder("tokenizer").write(MANIFEST, other)
    assert any("describes tokenizer/000" in finding for finding in copy.findings("tokenizer"))


def test_a_shard_that_is_not_listed(copy):
    manifest = manifest_of(copy.store, copy.refs["codes"])
    copy.set_manifest("codes", files=tuple(entry for entry in manifest.files if entry.path != TRAIN))
    found = copy.findings("codes")
    assert f"{TRAIN}: is not listed in {MANIFEST}; delete the artifact's folder and run again" in found
    assert any(f"{TRAIN}: is a shard of images/" in finding for finding in found)


# --- codes -----------------------------------------------------------------------------------------------------------


def failed_parquet(keys: list[tuple[str, str]]) -> bytes:
    sink = io.BytesIO()
    rows = {"image_id": [i for i, _ in keys], "variant": [v for _, v in keys], "reason": ["why"] * len(keys)}
    pq.write_table(pa.table(rows), sink)
    return sink.getvalue()


def drop_row(copy: Copy, name: str) -> tuple[str, str]:
    table = copy.table("codes", name)
    total = manifest_of(copy.store, copy.refs["codes"]).counts["rows"]
    copy.rewrite_table("codes", name, table.slice(1), rows=total - 1)
    return table["image_id"][0].as_py(), table["variant"][0].as_py()


def test_a_view_that_is_missing(copy):
    image_id, _ = drop_row(copy, TRAIN)
    found = copy.findings("codes")
    assert f"{TRAIN}: 1 views are neither here nor in failed.parquet: \"('{image_id}', 'affine-1')\"" in found[0]
    assert "rows + 0 failed are not" in found[1]


def test_a_view_that_failed_is_accounted_for(copy):
    key = drop_row(copy, TRAIN)
    copy.rewrite("codes", "failed.parquet", failed_parquet([key]), 1)
    assert copy.findings("codes") == []
    assert any("+ 1 failed" in line for line in copy.verify("codes").artifacts[0].proven)


def test_failed_views_that_cannot_be(copy):
    table = copy.table("codes", TRAIN)
    here = (table["image_id"][0].as_py(), table["variant"][0].as_py())
    copy.rewrite("codes", "failed.parquet", failed_parquet([here, ("nobody.png", "center")]), 2)
    found = " | ".join(copy.findings("codes"))
    assert f"{TRAIN}: 1 views are here and in failed.parquet" in found
    assert "failed.parquet: lists views of no image or variant of this dataset" in found
    copy.rewrite("codes", "failed.parquet", b"no table", 0)
    assert "failed.parquet: cannot be read" in " | ".join(copy.findings("codes"))


def with_column(table: pa.Table, name: str, values: list[object]) -> pa.Table:
    place = table.schema.get_field_index(name)
    return table.set_column(place, table.schema.field(name), pa.array(values, table.schema.field(name).type))


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("image_id", "a/nobody.png", "1 rows are of no image or variant of this shard"),
        ("variant", "flip", "1 rows are of no image or variant of this shard"),
        ("class_id", None, "1 images have another class here than among the images"),
        ("codes", [300] * 16, "codes from"),
    ],
)
def test_a_row_that_is_changed(copy, column, value, said):
    table = copy.table("codes", TRAIN)
    values = table[column].to_pylist()
    copy.rewrite_table("codes", TRAIN, with_column(table, column, [value, *values[1:]]))
    assert any(finding.startswith(f"{TRAIN}: {said}") for finding in copy.findings("codes"))


def test_a_row_that_comes_twice(copy):
    table = copy.table("codes", TRAIN)
    total = manifest_of(copy.store, copy.refs["codes"]).counts["rows"]
    copy.rewrite_table("codes", TRAIN, pa.concat_tables([table.slice(0, 1), table]), rows=total + 1)
    found = copy.findings("codes")
    assert found[0].startswith(f"{TRAIN}: rows come twice: ")
    assert any("rows + 0 failed are not" in finding for finding in found)


def test_files_of_another_tokenizer_and_wrong_counts(copy):
    copy.rewrite_info(VAL, tokenizer="0" * 32)
    assert any(f"{VAL}: tokenizer is '{'0' * 32}'" in finding for finding in copy.findings("codes"))
    for entry in manifest_of(copy.store, copy.refs["codes"]).files:
        copy.rewrite_info(entry.path, tokenizer="0" * 32)
    (finding,) = copy.findings("codes")  # alike among themselves, and still not of the manifest's tokenizer
    assert f"tokenizer is '{'0' * 32}', {MANIFEST} says '{copy.refs['tokenizer'].digest}'" in finding


def test_counts_that_are_not_the_rows(copy):
    counts = manifest_of(copy.store, copy.refs["codes"]).counts
    copy.set_manifest("codes", counts={**counts, "rows": 1})
    (finding,) = copy.findings("codes")
    assert finding.startswith(f"{MANIFEST}: counts.rows = 1, the files have {counts['rows']}")


def test_codes_whose_images_are_gone_are_not_called_whole(copy):
    copy.folder("images").delete_tree()
    (finding,) = copy.findings("codes")
    assert "that no image is missing cannot be proven; name the store that holds both" in finding
    assert "is missing: the artifact was not finished" in str(copy.verify("codes", inputs=True).artifacts[1].findings)


def test_a_shard_in_the_folder_of_another_dataset_is_read_there(copy):
    """A new version of a dataset names the shards that it has in common with an older one."""
    manifest = manifest_of(copy.store, copy.refs["codes"])
    elsewhere = copy.store.at("artifacts", "codes", "0" * 32)
    elsewhere.write(TRAIN, copy.folder("codes").read(TRAIN))
    copy.folder("codes").delete(TRAIN)
    copy.folder("codes").delete(f"{TRAIN}.json")
    source = f"artifacts/codes/{'0' * 32}/{TRAIN}"
    files = tuple(
        entry.model_copy(update={"source": source}) if entry.path == TRAIN else entry for entry in manifest.files
    )
    copy.set_manifest("codes", files=files)
    assert copy.findings("codes") == []
    elsewhere.delete(TRAIN)
    assert copy.findings("codes") == [f"{TRAIN}: is missing; delete the artifact's folder and run again"]


# --- images and samples ----------------------------------------------------------------------------------------------


def images_table(copy: Copy, name: str, change) -> pa.Table:
    table = copy.table("images", name)
    rows = table.to_pylist()
    change(rows)
    return pa.Table.from_pylist(rows, schema=table.schema)


def test_an_image_that_is_not_the_one_that_was_prepared(copy):
    def change(rows):
        rows[0]["image"]["bytes"] += b"x"

    copy.rewrite_table("images", TRAIN, images_table(copy, TRAIN, change))
    (finding,) = copy.findings("images")
    assert finding.startswith(f"{TRAIN}: 1 images are not the bytes that their sha256 is of: 'a/")


def test_a_label_that_was_changed_is_seen_by_the_content_digest(copy):
    def change(rows):
        rows[0]["label"] = 1 - rows[0]["label"]

    copy.rewrite_table("images", TRAIN, images_table(copy, TRAIN, change))
    (finding,) = copy.findings("images")
    assert "content_digest is" in finding

    def beyond(rows):
        rows[0]["label"] = 2

    copy.rewrite_table("images", TRAIN, images_table(copy, TRAIN, beyond))
    assert f"{TRAIN}: 1 images have a label beyond 2 class names" in copy.findings("images")[0]


def test_the_content_digest_of_an_earlier_version_is_not_called_wrong(copy):
    """It was of a sorted list; those artifacts are as whole as ever, and nothing new is made of them."""
    manifest = manifest_of(copy.store, copy.refs["images"])
    plan = manifest.plan.model_copy(update={"version": 1})
    earlier = manifest.model_copy(update={"version": 1, "digest": plan.digest, "content_digest": "0" * 32})
    shutil.copytree(copy.folder("images").path, folder_of(copy.store, "images", plan.digest).path)
    folder_of(copy.store, "images", plan.digest).write(MANIFEST, earlier.model_dump_json().encode())
    (found,) = verify(f"images/{plan.digest}", store=copy.store.uri).artifacts
    assert found.findings == ()
    assert any("not the content digest" in line for line in found.proven)


def test_an_image_in_another_shard_and_one_in_both_splits(copy):
    first = copy.table("images", TRAIN)
    second = copy.table("images", "train-00002-of-00003.parquet")
    moved = pa.concat_tables([second, first.slice(0, 1)])
    copy.rewrite_table("images", "train-00002-of-00003.parquet", moved)
    image_id = first["image_id"][0].as_py()
    found = " | ".join(copy.findings("images"))
    assert f"train-00002-of-00003.parquet: 1 images belong into another shard: '{image_id}'" in found
    assert f"image '{image_id}' comes twice" in found
    assert any(f"1 images belong in another shard: '{image_id}'" in finding for finding in copy.findings("codes"))
    counts = manifest_of(copy.store, copy.refs["images"]).counts
    assert f"counts.accepted = {counts['accepted']}, the files have {counts['accepted'] + 1}" in found


def test_rejects_that_were_lost(copy):
    copy.rewrite_table("images", "rejects.parquet", copy.table("images", "rejects.parquet").slice(1))
    found = " | ".join(copy.findings("images"))
    assert "counts.rejected = 2, the files have 1" in found
    assert "counts.found = 22, the files have 21" in found


def test_samples_that_are_not_balanced(copy):
    info, rows = from_parquet(copy.folder("samples").read(SAMPLES))
    kept = rows._replace(class_id=np.zeros_like(rows.class_id))
    copy.rewrite("samples", SAMPLES, to_parquet(info, kept), len(rows.image_id))
    assert f"{MANIFEST}: classes are not 3 times each: 'a: " in copy.findings("samples")[0]
    other = info.model_copy(update={"sampling": {"generator": "0" * 32}})
    copy.rewrite("samples", SAMPLES, to_parquet(other, rows), len(rows.image_id))
    assert f"{SAMPLES}: sampling.generator is '{'0' * 32}'" in copy.findings("samples")[0]


def test_a_sample_that_comes_twice(copy: Copy, tmp_path: Path):
    info, rows = from_parquet(copy.folder("samples").read(SAMPLES))
    name = "sample-00001-of-00002.parquet"
    _, others = from_parquet(copy.folder("samples").read(name))
    twice = others._replace(image_id=[rows.image_id[0], *others.image_id[1:]])
    copy.rewrite("samples", name, to_parquet(info, twice), len(others.image_id))
    assert f"{SAMPLES}, {name}: sample '{rows.image_id[0]}' comes twice" in copy.findings("samples")[0]


LARGE = """
import re, sys
from pathlib import Path
import psutil
from sftok.prepare.verify import ImagesCheck
from infra.artifacts.lineage import resolve
from infra.artifacts.shards import FileEntry
from infra.store.store import Store
store, ref, name, rows = Store(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
check = ImagesCheck(resolve(store, ref), None)
small = psutil.Process().memory_info().rss
entry = FileEntry(path=name.name, size=0, sha256="0" * 64, rows=rows)
print([str(finding) for finding in check.file(entry, name)[0]])
print(int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024 - small)
"""


def test_a_large_image_shard_is_checked_in_little_memory(copy: Copy, tmp_path: Path):
    """Guards against Arrow's reading ahead: a shard may be a gigabyte."""
    schema, large = copy.table("images", TRAIN).schema, tmp_path / "train-00000-of-00001.parquet"
    data = np.random.default_rng(0).bytes(500_000)
    row = {"image": {"bytes": data, "path": "x"}, "label": 0, "sha256": hashlib.sha256(data).hexdigest()}
    with pq.ParquetWriter(large, schema, compression="none", use_dictionary=False) as writer:
        for group in range(30):
            rows = [{**row, "image_id": f"{group:02d}-{n:02d}"} for n in range(16)]
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    command = [sys.executable, "-c", LARGE, copy.store.uri, str(copy.refs["images"]), str(large), "480"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    findings, memory = done.stdout.splitlines()
    assert findings == "[]"
    assert large.stat().st_size > 240e6
    assert int(memory) < 160e6
