"""`sftok ls`, `cp`, `pin` and the forward lineage, on artifacts that stages made."""

import json
import os
import shutil
import time
import uuid
from pathlib import Path

import pytest

from flows.cli.main import main
from flows.pipeline import graph
from flows.recipes.registry import RECIPES
from flows.runs.journal import RunRecord, StageRecord
from flows.store.garbage import kept_keys
from flows.store.inventory import size_text
from infra.artifacts.inventory import descendants, key_of_ref, manifests, pins, with_ancestors
from infra.artifacts.manifest import ArtifactPlan, ArtifactRef, folder_of, manifest_of, publish, verify
from infra.artifacts.shards import put
from infra.store.store import Store
from tests.support.small_dataset import Made, draw_images

Built = tuple[Made, dict[str, ArtifactRef]]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Two versions of a dataset and the codes of each; the second shares shards with the first."""
    place = tmp_path_factory.mktemp("built")
    draw_images(place / "source")
    made = Made(Store(place / "store"), place / "source")
    refs = {"tokenizer": made.tokenizer(0), "images": made.run(graph.PREPARE)}
    refs["codes"] = made.run(graph.ENCODE, images=refs["images"], tokenizer=refs["tokenizer"])
    draw_images(place / "source", 21)
    refs["more_images"] = made.run(graph.PREPARE)
    refs["more_codes"] = made.run(graph.ENCODE, images=refs["more_images"], tokenizer=refs["tokenizer"])
    record = RunRecord(
        run="20260301-100000-digits-0000",
        recipe=RECIPES["digits"](),
        store=made.store.uri,
        source="x",
        workers=0,
        state="Completed",
        started_at="2026-03-01T10:00:00+00:00",
        stages={"encode": StageRecord(state="Completed", ref=refs["codes"])},
    )
    made.store.write(f"runs/{record.run}/run.json", record.model_dump_json().encode())
    return made, refs


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def run_json(capsys: pytest.CaptureFixture[str], *arguments: object):
    assert run(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_ls_shows_every_artifact_and_who_uses_it(built: Built, capsys: pytest.CaptureFixture[str]) -> None:
    made, refs = built
    found = {one["ref"]: one for one in run_json(capsys, "ls", "--store", made.store.uri)}
    assert set(found) == {str(ref) for ref in refs.values()}
    assert found[str(refs["codes"])]["runs"] == ["20260301-100000-digits-0000"]
    assert found[str(refs["images"])]["runs"] == []
    manifest = manifest_of(made.store, refs["codes"])
    assert found[str(refs["codes"])]["bytes"] == sum(entry.size for entry in manifest.files)
    assert run("ls", "--store", made.store.uri, "--kind", "codes") == 0
    assert capsys.readouterr().out.count("codes/") == 2
    only = run_json(capsys, "ls", "--store", made.store.uri, "--run", "20260301-100000-digits-0000")
    assert [one["ref"] for one in only] == [str(refs["codes"])]
    assert run("ls", "--store", made.store.uri, "--run", "none") == 2
    assert "there is no run 'none'" in capsys.readouterr().err


def test_lineage_goes_back_and_forward(built: Built, capsys: pytest.CaptureFixture[str]) -> None:
    made, refs = built
    found = manifests(made.store)
    assert descendants(found, key_of_ref(refs["tokenizer"])) == {
        key_of_ref(refs["codes"]),
        key_of_ref(refs["more_codes"]),
    }
    assert with_ancestors(found, [key_of_ref(refs["codes"])]) == {
        key_of_ref(refs[n]) for n in ("codes", "images", "tokenizer")
    }
    shown = run_json(capsys, "show", refs["images"], "--lineage", "--store", made.store.uri)
    assert shown["users"] == [str(refs["codes"])]
    assert run("show", refs["tokenizer"], "--lineage", "--store", made.store.uri) == 0
    assert capsys.readouterr().out.partition("used by")[2].count("codes/") == 2
    assert "users" not in run_json(capsys, "show", refs["images"], "--store", made.store.uri)


def test_pins_keep_what_they_name_and_what_it_stands_on(built: Built, capsys: pytest.CaptureFixture[str]) -> None:
    made, refs = built
    place = ["--store", made.store.uri]
    first = run_json(capsys, "pin", refs["more_codes"], "--reason", "in the paper", *place)
    assert run_json(capsys, "pin", refs["more_codes"], "--reason", "again", *place) == first, "the first reason stays"
    found = manifests(made.store)
    kept = kept_keys(found, [], pins(made.store))
    assert kept == {key_of_ref(refs[name]) for name in ("more_codes", "more_images", "tokenizer")}
    assert [one["pinned"] for one in run_json(capsys, "ls", *place) if one["ref"] == str(refs["more_codes"])] == [True]
    assert run("unpin", refs["more_codes"], *place) == 0
    capsys.readouterr()
    assert pins(made.store) == {}
    assert run("unpin", refs["more_codes"], *place) == 2
    assert "is not pinned; `sftok ls` shows what is" in capsys.readouterr().err


def test_cp_copies_and_verifies(built: Built, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, refs = built
    target = Store(tmp_path / "target")
    copied = run_json(capsys, "cp", refs["more_codes"], target.uri, "--store", made.store.uri)
    assert [one["ref"] for one in copied] == [str(refs["more_codes"])]
    manifest = manifest_of(target, refs["more_codes"])
    assert manifest.counts["reused"] > 0, "shards that lie with another version come along"
    verify(target, manifest)
    assert manifest == manifest_of(made.store, refs["more_codes"])
    again = run_json(capsys, "cp", refs["more_codes"], target.uri, "--inputs", "--store", made.store.uri)
    assert {one["ref"]: one["was_there"] for one in again} == {
        str(refs["tokenizer"]): False,
        str(refs["more_images"]): False,
        str(refs["more_codes"]): True,
    }
    assert run("verify", refs["more_codes"], "--inputs", "--store", target.uri) == 0
    assert run("cp", refs["codes"], made.store.uri, "--store", made.store.uri) == 2
    assert "is the store to copy from" in capsys.readouterr().err


def test_cp_goes_on_where_it_was_killed(built: Built, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, refs = built
    target = Store(tmp_path / "target")
    first = manifest_of(made.store, refs["codes"]).files[0]
    key = f"artifacts/codes/{refs['codes'].digest}/{first.path}"
    target.write(key, made.store.read(key))
    (copied,) = run_json(capsys, "cp", refs["codes"], target.uri, "--store", made.store.uri)
    assert copied["skipped"] == 1
    verify(target, manifest_of(target, refs["codes"]))


def test_cp_refuses_what_is_damaged(built: Built, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, refs = built
    source, target = Store(tmp_path / "source"), Store(tmp_path / "target")
    assert run("cp", refs["images"], source.uri, "--store", made.store.uri) == 0
    folder = folder_of(source, "images", refs["images"].digest)
    name = next(name for name in folder.list() if name.endswith(".parquet"))
    folder.write(name, b"x" + folder.read(name)[1:])
    capsys.readouterr()
    assert run("cp", refs["images"], target.uri, "--store", source.uri) == 2
    assert f"{name} is not what manifest.json says" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no finished artifact"):
        manifest_of(target, refs["images"])
    assert not target.exists(f"artifacts/images/{refs['images'].digest}/{name}")


def test_openlineage_names_what_was_read_and_written(built: Built, capsys: pytest.CaptureFixture[str]) -> None:
    made, refs = built
    assert run("openlineage", "20260301-100000-digits-0000", "--store", made.store.uri) == 0
    (event,) = json.loads(capsys.readouterr().out)
    assert (event["eventType"], event["job"]["name"]) == ("COMPLETE", "digits.encode")
    names = {dataset["name"]: dataset["facets"]["version"]["datasetVersion"] for dataset in event["inputs"]}
    assert set(names) == {str(refs["images"]), str(refs["tokenizer"])}
    assert names[str(refs["images"])] == refs["images"].content_digest
    (output,) = event["outputs"]
    manifest = manifest_of(made.store, refs["codes"])
    assert output["name"] == str(refs["codes"])
    assert output["outputFacets"]["outputStatistics"]["rowCount"] == manifest.counts["rows"]
    assert {dataset["namespace"] for dataset in [*event["inputs"], output]} == {made.store.uri}
    assert uuid.UUID(event["run"]["runId"]) != uuid.UUID(event["run"]["facets"]["parent"]["run"]["runId"])
    assert run("openlineage", "none", "--store", made.store.uri) == 2


@pytest.mark.s3
def test_cp_to_s3_and_back(built: Built, s3_store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, refs = built
    assert run("cp", refs["codes"], s3_store.uri, "--store", made.store.uri) == 0
    back = Store(tmp_path / "back")
    assert run("cp", refs["codes"], back.uri, "--store", s3_store.uri) == 0
    capsys.readouterr()
    verify(back, manifest_of(back, refs["codes"]))


# --- garbage ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def store_of_runs(built: Built, tmp_path: Path) -> tuple[Store, dict[str, ArtifactRef]]:
    """A copy of the store; an old run made the first codes, a young one the second, which share shards with them."""
    made, refs = built
    place = tmp_path / "store"
    shutil.copytree(made.store.path, place)
    store = Store(place)
    write_run(store, "20260302-100000-digits-0001", "2026-03-02T10:00:00+00:00", refs["more_codes"], refs["tokenizer"])
    return store, refs


def write_run(store: Store, name: str, started_at: str, *refs: ArtifactRef, state: str = "Completed") -> None:
    record = RunRecord(
        run=name,
        recipe=RECIPES["digits"](),
        store=store.uri,
        source="x",
        workers=0,
        state=state,
        started_at=started_at,
        stages={f"{number}": StageRecord(state="Completed", ref=ref) for number, ref in enumerate(refs)},
    )
    store.write(f"runs/{name}/run.json", record.model_dump_json().encode())


def names(store: Store) -> set[str]:
    return {"/".join(key) for key in manifests(store)}


def collect(capsys: pytest.CaptureFixture[str], store: Store, *arguments: object):
    return run_json(capsys, "gc", "--store", store.uri, *arguments)


def test_gc_takes_old_runs_and_what_only_they_stood_on(store_of_runs, capsys: pytest.CaptureFixture[str]) -> None:
    store, refs = store_of_runs
    before = store.list()
    told = collect(capsys, store, "--keep-last", 1, "--dry-run")
    assert store.list() == before, "a dry run removes nothing"
    made = collect(capsys, store, "--keep-last", 1)
    assert {**told, "dry_run": False} == made
    assert made["runs"] == ["20260301-100000-digits-0000"]
    assert set(made["artifacts"]) == {str(refs["codes"]), str(refs["images"])}
    assert made["shared"] > 0
    assert names(store) == {str(refs[name]) for name in ("tokenizer", "more_images", "more_codes")}
    verify(store, manifest_of(store, refs["more_codes"]))
    assert run("verify", refs["more_codes"], "--store", store.uri) == 0, "shards that it shares are still there"
    capsys.readouterr()
    again = collect(capsys, store, "--keep-last", 1)
    assert (again["files"], again["artifacts"], again["leftovers"]) == (0, [], [])


@pytest.mark.parametrize("guard", ["keep_last", "older_than", "pin", "running"])
def test_gc_leaves_what_is_kept(store_of_runs, capsys: pytest.CaptureFixture[str], guard: str) -> None:
    store, refs = store_of_runs
    before = names(store)
    options: list[object] = ["--keep-last", 1]
    if guard == "keep_last":
        options = ["--keep-last", 2]
    elif guard == "older_than":
        options += ["--older-than", "1000w"]
    elif guard == "pin":
        assert run("pin", refs["codes"], "--store", store.uri) == 0
    else:
        write_run(store, "20260301-110000-digits-0002", "2026-03-01T11:00:00+00:00", refs["codes"], state="Running")
    capsys.readouterr()
    assert collect(capsys, store, *options)["artifacts"] == []
    assert names(store) == before


def test_gc_leaves_what_no_run_has_made(store_of_runs, capsys: pytest.CaptureFixture[str]) -> None:
    """Imported weights are in no run."""
    store, _ = store_of_runs
    plan = ArtifactPlan(kind="teacher", version=1, config={"imported": "x"})
    files = [put(folder_of(store, "teacher", plan.digest), "x", b"x")]
    publish(store, plan, files=files, counts={}, metrics={}, seconds=0)
    collect(capsys, store, "--keep-last", 1)
    assert f"teacher/{plan.digest}" in names(store)


def test_gc_takes_leftovers_after_their_grace(store_of_runs, capsys: pytest.CaptureFixture[str]) -> None:
    store, _ = store_of_runs
    store.write(f"artifacts/codes/{'a' * 32}/train-00000-of-00001.parquet", b"half a run")
    partial = store.path / "artifacts" / "codes" / ".partial-0123"
    partial.write_bytes(b"half a file")
    assert collect(capsys, store)["leftovers"] == [], "it may be at work"
    for path in (partial, store.path / "artifacts/codes" / ("a" * 32) / "train-00000-of-00001.parquet"):
        os.utime(path, (0, 0))
    made = collect(capsys, store)
    assert made["leftovers"] == [f"codes/{'a' * 32}"]
    assert made["uploads"] == 1
    assert not partial.exists()
    assert not store.list(f"artifacts/codes/{'a' * 32}")


def test_gc_stops_at_a_damaged_manifest(store_of_runs, capsys: pytest.CaptureFixture[str]) -> None:
    store, refs = store_of_runs
    key = f"artifacts/codes/{refs['more_codes'].digest}/manifest.json"
    store.write(key, store.read(key)[:-10])
    before = store.list()
    assert run("gc", "--keep-last", 1, "--store", store.uri) == 2
    assert "manifest.json" in capsys.readouterr().err
    assert store.list() == before
    assert run("gc", "--older-than", "soon", "--store", store.uri) == 2
    assert "--older-than 'soon' is no age: write 12h, 7d or 4w" in capsys.readouterr().err


@pytest.mark.s3
def test_gc_aborts_uploads_on_s3(s3_store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    s3_store.write("artifacts/codes/x", b"x")
    key = f"{s3_store._prefix}artifacts/big"
    s3_store._backend._request("create_multipart_upload", key, Key=key)
    assert len(list(s3_store.unfinished_writes())) == 1
    assert collect(capsys, s3_store)["uploads"] == 0, "it may be at work"
    time.sleep(1.1)  # S3 tells times to the second
    assert collect(capsys, s3_store, "--grace", "0h")["uploads"] == 1
    assert list(s3_store.unfinished_writes()) == []


@pytest.mark.parametrize(
    ("size", "text"), [(999, "999 bytes"), (1_000, "1.0 kB"), (2.5e9, "2.5 GB"), (3e15, "3000.0 TB")]
)
def test_sizes_as_people_say_them(size: float, text: str) -> None:
    assert size_text(size) == text
