"""`sftok import-weights` and `sftok export-weights` on toy models in a store on disk."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from infra.artifacts.lineage import find_artifact
from infra.artifacts.manifest import manifest_of, verify
from infra.store.store import Store
from sftok.model.teacher import Teacher
from sftok.model.tokenizer import SFTok
from sftok.weights.artifacts import load_teacher, load_tokenizer
from sftok.weights.convert import config_file_of, load_published, read_tensors, to_published
from tests.support.weights_cli import SIZE, a_teacher, a_tokenizer, published, run, written

MODELS = {"sftok": lambda: a_tokenizer(legacy=True), "teacher": a_teacher}


def import_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict:
    assert run("import-weights", *arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def assert_equal(ours: SFTok | Teacher, theirs: SFTok | Teacher) -> None:
    a, b = ours.state_dict(), theirs.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert config_file_of(ours).as_json() == config_file_of(theirs).as_json()


# --- in --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_import_publishes_an_artifact_and_finds_it_again(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """The second import finds the first one by the file's hash, wherever the file has moved."""
    model = MODELS[kind]()
    file = written(tmp_path, model)
    first = import_json(capsys, file, "--kind", kind, "--store", store.uri)
    moved = file.rename(tmp_path / "moved.bin")
    second = import_json(capsys, moved, "--kind", kind, "--store", store.uri)
    assert (first["state"], second["state"]) == ("Completed", "Cached")
    assert first["ref"] == second["ref"]

    found = find_artifact(first["uri"], None, "tokenizer", "teacher")
    manifest = found.manifest
    verify(store, manifest)
    parameters = sum(p.numel() for p in model.parameters())
    assert manifest.kind == {"sftok": "tokenizer", "teacher": "teacher"}[kind]
    assert manifest.version == 1
    assert manifest.config["imported"] == hashlib.sha256(moved.read_bytes()).hexdigest()
    assert manifest.config["layout"] == {"sftok": "stage_3", "teacher": "teacher"}[kind]
    assert (manifest.counts, manifest.metrics) == ({"parameters": parameters}, {})
    assert {entry.path for entry in manifest.files} == {"model.safetensors", "config.json"}
    assert (first["parameters"], first["keys"]) == (parameters, len(to_published(model)))
    # init_std is how training began; weights from elsewhere do not tell.
    loaded = load_teacher(found.folder) if kind == "teacher" else load_tokenizer(found.folder)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_import_says_what_it_recognised(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("import-weights", written(tmp_path, MODELS["sftok"]()), "--kind", "sftok", "--store", store.uri) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("tokenizer/")
    assert lines[0].endswith("  imported")
    assert "none of S, B, L: encoder 64 x 1, decoder 64 x 1" in lines[1]
    assert "stage 3, with pixel decoder" in lines[2]
    assert lines[4].split()[1].startswith(f"{store.uri}/artifacts/tokenizer/")


def test_what_a_config_says_belongs_to_the_identity(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two layouts of one file compute different codes: they are different artifacts."""
    file, model = written(tmp_path, a_tokenizer()), a_tokenizer()
    config = tmp_path / "native.json"
    config.write_text(config_file_of(model).model_dump_json())
    plain = import_json(capsys, file, "--kind", "sftok", "--store", store.uri)
    stated = import_json(capsys, file, "--kind", "sftok", "--store", store.uri, "--config", config)
    assert plain["ref"] != stated["ref"]
    layouts = [load_tokenizer(Store(made["uri"])).config.legacy_layout for made in (plain, stated)]
    assert layouts == [True, False]


@pytest.mark.parametrize("arguments", [["--kind", "teacher"], ["--kind", "sftok", "--config", "missing.json"]])
def test_refused_imports_are_one_line_and_leave_no_artifact(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    file = written(tmp_path, a_tokenizer())
    assert run("import-weights", file, *arguments, "--store", store.uri) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert not store.list()


def test_a_file_of_nans_leaves_no_artifact(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = a_teacher()
    model.codebook.weight[0, 0] = float("nan")
    assert run("import-weights", written(tmp_path, model), "--kind", "teacher", "--store", store.uri) == 2
    assert "NaN or infinity in 1 weights, such as quantize.embedding.weight" in capsys.readouterr().err
    assert not store.list()


# --- out -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
@pytest.mark.parametrize("make", [a_teacher, a_tokenizer, MODELS["sftok"]])
def test_an_exported_model_comes_back_as_it_was(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], make: object, file_format: str
) -> None:
    """Weights bit by bit, and what shapes cannot tell (heads, layout, groups) by config.json."""
    model, out = make(), tmp_path / "a" / "b"
    ref = published(store, model)
    assert run("export-weights", ref, out, "--format", file_format, "--store", store.uri, "--json") == 0
    made = json.loads(capsys.readouterr().out)
    name = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}[file_format]
    assert made["files"] == [str(out / name), str(out / "config.json")]
    assert {file.name for file in out.iterdir()} == {name, "config.json"}
    assert read_tensors(out / name).keys() == to_published(model).keys()
    assert_equal(load_published(out), model)
    kind = "teacher" if isinstance(model, Teacher) else "sftok"
    again = import_json(capsys, out, "--kind", kind, "--store", store.uri)
    folder = Store(again["uri"])
    assert_equal(load_teacher(folder) if kind == "teacher" else load_tokenizer(folder), model)


def test_the_native_layout_is_the_artifacts(store: Store, tmp_path: Path) -> None:
    model = a_tokenizer()
    ref = published(store, model)
    assert run("export-weights", ref, tmp_path / "out", "--layout", "native", "--store", store.uri) == 0
    assert_equal(load_tokenizer(Store(tmp_path / "out")), model)


def test_what_the_published_code_must_be_told_is_said(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ref = published(store, a_tokenizer())
    assert run("export-weights", ref, tmp_path / "out", "--store", store.uri) == 0
    assert "note: the encoder's output is not in the legacy layout: set is_legacy to false" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_nothing_is_overwritten(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    ref, out = published(store, a_teacher()), tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    assert run("export-weights", ref, out, "--store", store.uri) == 2
    assert f"{out / name} exists" in capsys.readouterr().err
    assert [file.name for file in out.iterdir()] == [name]
    assert (out / name).read_text() == "mine"


def test_refused_exports_are_one_line(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ref, out = published(store, a_teacher()), tmp_path / "out"
    (tmp_path / "file").write_text("in the way")
    damaged = published(store, a_tokenizer())
    weights = Store(damaged.uri)
    weights.write("model.safetensors", weights.read("model.safetensors")[:-1] + b"\1")
    for arguments, said in [
        (["teacher/ffff", out], "is no finished artifact"),
        ([ref, tmp_path / "file" / "below"], "cannot be made a folder"),
        ([damaged, out], "model.safetensors is not what manifest.json says"),
    ]:
        assert run("export-weights", *arguments, "--store", store.uri) == 2
        printed = capsys.readouterr()
        assert (printed.out, printed.err.count("\n")) == ("", 1)
        assert said in printed.err
    assert not out.exists()


def test_another_kind_of_artifact_is_named(store: Store) -> None:
    ref = published(store, a_teacher())
    with pytest.raises(ValueError, match=rf"{ref}, where a tokenizer is wanted"):
        find_artifact(str(ref), store.uri, "tokenizer")
    assert find_artifact(ref.uri, None, "teacher").manifest == manifest_of(store, ref)


@pytest.mark.parametrize("command", ["import-weights", "export-weights", "reconstruct"])
def test_help_shows_examples(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert run(command, "--help") == 0
    assert f"  sftok {command}" in capsys.readouterr().out.partition("Examples:")[2]


def test_imported_tokenizers_encode(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = MODELS["sftok"]()
    made = import_json(capsys, written(tmp_path, model), "--kind", "sftok", "--store", store.uri)
    images = torch.rand(3, 3, SIZE, SIZE)
    assert torch.equal(load_tokenizer(Store(made["uri"])).encode(images).codes, model.encode(images).codes)
