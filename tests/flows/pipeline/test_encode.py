"""`sftok encode` and its flow: a dataset through a tokenizer that is there already, and again after it has changed."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flows.recipes.schema import EncodeConfig
from flows.requests.checks import check_rerun
from flows.requests.encode import encode_request
from flows.runs.journal import RunRecord, StageFailedError
from flows.store.verify import verify as verify_command
from infra.artifacts.lineage import resolve
from infra.artifacts.manifest import key_of, manifest_of, verify
from infra.codes.contract import read_codes
from infra.store.store import Store
from tests.support.weights_cli import SIZE, a_teacher, a_tokenizer, published, written

ENCODE = EncodeConfig(micro_batch=4)


def draw(folder: Path, numbers: range) -> Path:
    for number in numbers:
        path = folder / "ab"[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (SIZE, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return draw(tmp_path / "data", range(40))


@pytest.fixture
def tokenizer(store: Store) -> str:
    return str(published(store, a_tokenizer()))


@pytest.fixture
def retokenize(prefect_api: str, store: Store, tokenizer: str, data: Path) -> Callable[..., RunRecord]:
    """Run the flow in this process."""

    def run(name: str, encode: EncodeConfig = ENCODE, **changes: Any) -> RunRecord:
        from flows.pipeline.full import retokenize as flow

        is_anew = changes.pop("anew", False)
        arguments = {"store": store.uri, "tokenizer": tokenizer, "data": str(data), **changes}
        return flow(encode_request(encode, **arguments).changed(anew=is_anew), name)

    return run


def test_prepare_and_encode_are_tasks_that_are_found_the_second_time(retokenize, store, tokenizer) -> None:
    first = retokenize("first")
    assert {name: stage.state for name, stage in first.stages.items()} == {
        "prepare": "Completed",
        "encode": "Completed",
    }
    manifest = manifest_of(store, first.stages["encode"].ref)
    verify(store, manifest)
    assert verify_command(str(first.stages["encode"].ref), store=store.uri).ok
    info, rows = read_codes(store, [key_of(manifest, entry) for entry in manifest.files])
    assert (info.tokenizer, info.image_size, info.class_names) == (tokenizer.partition("/")[2], SIZE, ("a", "b"))
    assert len(set(rows.image_id)) == 40 == manifest.counts["rows"]
    second = retokenize("second")
    assert {stage.state for stage in second.stages.values()} == {"Cached"}
    assert second.stages["encode"].ref == first.stages["encode"].ref
    assert RunRecord.model_validate_json(store.read("runs/second/run.json")) == second


def test_prepared_images_need_no_source(retokenize, store) -> None:
    first = retokenize("first")
    images = first.stages["prepare"].ref
    for name, data in (("by-digest", f"images/{images.digest[:12]}"), ("by-uri", images.uri)):
        record = retokenize(name, data=data)
        assert list(record.stages) == ["encode"]
        assert record.stages["encode"].ref == first.stages["encode"].ref


def test_a_rerun_reads_the_same_images_from_any_folder_and_refuses_others(
    retokenize, store, tmp_path, monkeypatch, home
) -> None:
    from flows.pipeline.full import retokenize as flow

    monkeypatch.setenv("SFTOK_HOME", str(home))
    monkeypatch.chdir(tmp_path)
    first = retokenize("first", data="data")
    draw(tmp_path / "elsewhere" / "data", range(100, 120))
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = check_rerun("first", store=store.uri)
    assert (again.source, first.source) == (str(tmp_path / "data"), str(tmp_path / "data"))
    assert {stage.state for stage in flow(again, "again").stages.values()} == {"Cached"}
    os.utime(tmp_path / "data" / "a" / "00.png")  # read again, but the same image
    assert flow(check_rerun("again", store=store.uri), "touched").stages["encode"].state == "Cached"
    draw(tmp_path / "data", range(70, 71))
    with pytest.raises(StageFailedError, match=r"are not those of the run that is repeated .*restore them, or use"):
        flow(check_rerun("first", store=store.uri), "changed")
    assert retokenize("anew", data=str(tmp_path / "data")).state == "Completed"


def test_an_image_more_is_encoded_alone_with_its_shard(retokenize, store, data, tmp_path, tokenizer) -> None:
    old = manifest_of(store, retokenize("old").stages["encode"].ref)
    draw(data, range(70, 71))
    new = manifest_of(store, retokenize("new").stages["encode"].ref)
    assert (new.counts["shards"], new.counts["reused"], new.counts["rows"]) == (12, 11, 41)
    assert [entry.source is None for entry in new.files].count(True) == 1
    verify(store, new)
    assert new.digest != old.digest
    other = Store(tmp_path / "scratch")
    published(other, a_tokenizer())
    scratch = manifest_of(other, retokenize("scratch", store=other.uri).stages["encode"].ref)
    assert scratch.counts["reused"] == 0
    assert [(e.path, e.sha256) for e in scratch.files] == [(e.path, e.sha256) for e in new.files]
    assert scratch.digest == new.digest


def test_shards_of_two_kinds_of_device_are_not_mixed(retokenize, store, data, monkeypatch) -> None:
    """Neither by going on with what another kind began, nor by taking an earlier version's shards."""
    retokenize("here")
    monkeypatch.setattr("infra.compute.device.device_kind", lambda device: "cpu of another sort")
    draw(data, range(70, 71))
    elsewhere = manifest_of(store, retokenize("elsewhere").stages["encode"].ref)
    assert elsewhere.counts["reused"] == 0
    assert [facts["kind"] for facts in elsewhere.made_on] == ["cpu of another sort"]
    draw(data, range(71, 72))
    monkeypatch.setattr("sftok.coding.shard.write_shard", _interrupted)
    with pytest.raises(StageFailedError, match="interrupted"):
        retokenize("begun")
    monkeypatch.undo()
    with pytest.raises(StageFailedError, match=r"begun on cpu of another sort, and this is cpu .* --anew"):
        retokenize("mixed")
    again = manifest_of(store, retokenize("again", anew=True).stages["encode"].ref)
    assert again.counts["rows"] == 42
    assert "cpu of another sort" not in [facts["kind"] for facts in again.made_on]
    verify(store, again)


def test_what_another_kind_began_is_not_completed_from_an_earlier_version(retokenize, store, data, monkeypatch) -> None:
    """Guards against a mixture that no worker could refuse: every shard is found, and none is started."""
    old = manifest_of(store, retokenize("here").stages["prepare"].ref)
    draw(data, range(70, 71))
    unchanged = {entry.path: entry.sha256 for entry in old.files}
    images = retokenize("images", EncodeConfig(micro_batch=5)).stages["prepare"].ref
    known = set(store.at("artifacts", "codes").folders())
    monkeypatch.setattr("infra.compute.device.device_kind", lambda device: "cpu of another sort")
    monkeypatch.setattr("sftok.coding.encode._check_counts", _interrupted)
    with pytest.raises(StageFailedError, match="interrupted"):
        retokenize("elsewhere")
    (begun,) = set(store.at("artifacts", "codes").folders()) - known
    for entry in manifest_of(store, images).files:
        if unchanged.get(entry.path) == entry.sha256 and entry.path.endswith(".parquet") and "-of-" in entry.path:
            store.delete(f"artifacts/codes/{begun}/{entry.path}.json")
    monkeypatch.undo()
    with pytest.raises(StageFailedError, match=r"begun on cpu of another sort, and this is cpu .* --anew"):
        retokenize("mixed")


def _interrupted(*_: object) -> None:
    raise RuntimeError("interrupted")


def test_settings_decide_what_is_made(retokenize, store) -> None:
    plain = manifest_of(store, retokenize("plain").stages["encode"].ref)
    both = EncodeConfig(micro_batch=4, variants=("center", "flip"), precision="bf16")
    record = retokenize("both", both)
    assert record.stages["prepare"].state == "Cached"
    made = manifest_of(store, record.stages["encode"].ref)
    assert made.digest != plain.digest
    assert made.counts["reused"] == 0
    info, rows = read_codes(store, [key_of(made, entry) for entry in made.files])
    assert info.precision == "bf16"
    assert set(rows.variant) == {"center", "flip"}
    sharded = retokenize("sharded", overrides=["data.num_shards=3", "augment.rotate=5"])
    assert len(manifest_of(store, sharded.stages["encode"].ref).files) == 7


def test_a_mistake_ends_the_run_with_its_reason(retokenize, store) -> None:
    first = retokenize("first")
    images = manifest_of(store, first.stages["prepare"].ref)
    name = next(entry.path for entry in images.files if entry.path.startswith("train-"))
    store.write(f"artifacts/images/{images.digest}/{name}", b"no table")
    with pytest.raises(StageFailedError, match=rf"encode: .*{name} is no image Parquet"):
        retokenize("broken", EncodeConfig(micro_batch=5))


class TestRequests:
    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"tokenizer": "tokenizer/ffff"}, "no finished artifact"),
            ({"data": "images/ffff"}, "no finished artifact"),
            ({"overrides": ["encode.micro_batch=1"]}, "only data, augment, compute can be set"),
            ({"overrides": ["data.image_size=8"]}, "the tokenizer decides this"),
            ({"overrides": ["data.shards=8"]}, r"data\.shards: unknown field, did you mean num_shards"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, store, tokenizer, changes, said) -> None:
        arguments = {"tokenizer": tokenizer, "data": "sklearn:digits", "store": store.uri, **changes}
        with pytest.raises(ValueError, match=said):
            encode_request(ENCODE, **arguments)

    def test_a_teacher_is_no_tokenizer(self, store) -> None:
        teacher = str(published(store, a_teacher()))
        with pytest.raises(ValueError, match="where a tokenizer is wanted"):
            encode_request(ENCODE, tokenizer=teacher, data="sklearn:digits", store=store.uri)

    def test_affine_views_need_a_strength(self, store, tokenizer) -> None:
        encode = EncodeConfig(variants=("center", "affine-1"))
        arguments = {"tokenizer": tokenizer, "data": "sklearn:digits", "store": store.uri}
        with pytest.raises(ValueError, match=r"'affine-1'.*--set augment\.rotate=6"):
            encode_request(encode, **arguments)
        recipe = encode_request(encode, **arguments, overrides=["augment.rotate=6"]).recipe
        assert (recipe.augment.rotate, recipe.data.image_size, recipe.encode) == (6, SIZE, encode)

    @pytest.mark.parametrize(("views", "said"), [((), "is empty"), (("flip", "flip"), "names a view twice")])
    def test_views_are_named_once(self, views, said) -> None:
        with pytest.raises(ValueError, match=said):
            EncodeConfig(variants=views)


@pytest.mark.slow
def test_the_command_imports_encodes_and_finds(home, tmp_path, data) -> None:
    """In processes of their own, with a temporary server; the tokenizer is an imported one."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "RAY_", "SFTOK_"))}
    environment = {**clean, "SFTOK_HOME": str(home), "SFTOK_STORE": str(tmp_path / "shop"), "OMP_NUM_THREADS": "1"}

    def sftok(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(Path(sys.executable).parent / "sftok"), *arguments]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)

    weights = written(tmp_path, a_tokenizer(legacy=True))
    imported = sftok("import-weights", str(weights), "--kind", "sftok", "--json")
    assert imported.returncode == 0, imported.stderr
    ref = json.loads(imported.stdout)["ref"]
    encode = ("encode", "--tokenizer", ref, "--data", str(data), "--variants", "center,flip", "--workers", "1")
    first = sftok(*encode, "--micro-batch", "8", "--json")
    assert first.returncode == 0, first.stderr[-3000:]
    shown = json.loads(first.stdout)
    assert shown["counts"]["failed"] == 0
    assert {name: stage["state"] for name, stage in shown["stages"].items()} == {
        "prepare": "Completed",
        "encode": "Completed",
    }
    verify(Store(tmp_path / "shop"), resolve(Store(tmp_path / "shop"), shown["codes"]))
    again = json.loads(sftok(*encode, "--micro-batch", "8", "--json").stdout)
    assert again["codes"] == shown["codes"]
    assert {stage["state"] for stage in again["stages"].values()} == {"Cached"}
    refused = sftok("encode", "--tokenizer", ref, "--data", str(data), "--variants", "flip,flip")
    assert refused.returncode == 2
    assert refused.stderr == "sftok: --variants = flip, flip names a view twice: name each once\n"
    assert refused.stdout == ""
