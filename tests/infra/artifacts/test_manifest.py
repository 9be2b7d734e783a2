import json
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from infra.artifacts import made_with
from infra.artifacts.lineage import lineage, resolve
from infra.artifacts.manifest import (
    MANIFEST,
    ArtifactPlan,
    ArtifactRef,
    Manifest,
    _check_files,
    find,
    folder_of,
    key_of,
    publish,
    ref_of,
    verify,
)
from infra.artifacts.shards import FileEntry, put, shard_entry, write_shard
from infra.redaction import redact
from infra.store.store import Store

PLAN = ArtifactPlan(kind="images", version=1, config={"size": 32, "strength": 0.5})


def made(store: Store, plan: ArtifactPlan = PLAN, data: bytes = b"data", content: str | None = None) -> Manifest:
    entry = put(folder_of(store, plan.kind, plan.digest), "data.bin", data, rows=3)
    return publish(store, plan, files=[entry], counts={"n": 1}, metrics={"m": 0.5}, seconds=1, content_digest=content)


def ref(digit: str, content: str | None = None, uri: str = "/a") -> ArtifactRef:
    return ArtifactRef(kind="images", digest=digit * 32, uri=uri, content_digest=content)


class TestDigest:
    def test_is_the_same_on_every_machine_and_in_every_version(self) -> None:
        plan = ArtifactPlan(kind="codes", version=2, config={"b": [1, 0.5, None], "a": "é"}, inputs={"x": ref("a")})
        assert plan.digest == GOLDEN
        assert plan.prefix == f"artifacts/codes/{GOLDEN}"

    def test_changes_with_everything_that_is_computed(self) -> None:
        plans = [
            PLAN,
            PLAN.model_copy(update={"version": 2}),
            PLAN.model_copy(update={"kind": "codes"}),
            PLAN.model_copy(update={"config": {"size": 33, "strength": 0.5}}),
            PLAN.model_copy(update={"inputs": {"x": ref("a")}}),
            PLAN.model_copy(update={"inputs": {"y": ref("a")}}),
            PLAN.model_copy(update={"inputs": {"x": ref("b")}}),
        ]
        assert len({plan.digest for plan in plans}) == len(plans)

    def test_does_not_change_with_places_and_order(self) -> None:
        here = ArtifactPlan(kind="codes", version=1, config={"a": 1, "b": 2}, inputs={"x": ref("a"), "y": ref("b")})
        there = ArtifactPlan(
            kind="codes", version=1, config={"b": 2, "a": 1}, inputs={"y": ref("b"), "x": ref("a", uri="s3://other")}
        )
        assert here.digest == there.digest

    def test_of_what_is_made_of_outside_data_follows_its_content(self) -> None:
        plans = [ArtifactPlan(kind="codes", version=1, config={}, inputs={"x": ref(d, content="c")}) for d in "ab"]
        assert plans[0].digest == plans[1].digest


GOLDEN = "85d0b37b2af248e30af605c127437586"


class TestPublish:
    def test_nothing_is_found_before_and_the_same_after(self, store: Store) -> None:
        assert find(store, PLAN) is None
        put(store.at(*PLAN.prefix.split("/")), "data.bin", b"data")
        assert find(store, PLAN) is None
        manifest = made(store, content="c")
        assert find(store, PLAN) == manifest
        assert ref_of(store, manifest).content_id == "c"
        assert str(ref_of(store, manifest)) == f"images/{PLAN.digest}"

    def test_tells_where_it_came_from(self, store: Store) -> None:
        manifest = made(store)
        assert {"python", "torch", "numpy", "pyarrow", "ray", "prefect"} <= manifest.versions.keys()
        assert manifest.hardware.keys() == {"cpu", "cores", "memory_gib", "gpus"}
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", manifest.created_at)
        assert manifest.files[0].rows == 3

    def test_of_two_runs_one_wins_and_both_return_it(self, store: Store) -> None:
        with ThreadPoolExecutor(8) as pool:
            manifests = list(pool.map(lambda _: made(store), range(8)))
        assert all(manifest == find(store, PLAN) for manifest in manifests)

    def test_other_bytes_of_the_loser_are_said(self, store: Store, caplog: pytest.LogCaptureFixture) -> None:
        first = made(store)
        other = FileEntry(path="data.bin", size=1, sha256="0" * 64)
        second = publish(store, PLAN, files=[other], counts={}, metrics={}, seconds=1)
        assert second == first
        assert "with other bytes" in caplog.text

    def test_a_file_that_was_not_written_is_not_published(self, store: Store) -> None:
        entry = FileEntry(path="no.bin", size=1, sha256="0" * 64)
        with pytest.raises(ValueError, match=r"not written: no\.bin"):
            publish(store, PLAN, files=[entry], counts={}, metrics={}, seconds=1)
        assert find(store, PLAN) is None

    def test_a_file_that_is_listed_twice_is_not_published(self, store: Store) -> None:
        entry = put(folder_of(store, "images", PLAN.digest), "data.bin", b"data")
        with pytest.raises(ValueError, match=r"listed twice: data\.bin$"):
            publish(store, PLAN, files=[entry, entry], counts={}, metrics={}, seconds=1)

    def test_a_hundred_thousand_shards_take_no_request_each(self, store: Store) -> None:
        """Nor quadratic time: their sidecars vouched for them when they were written."""
        files = [
            FileEntry(path=f"train-{n:05d}-of-99999.parquet", size=1, sha256="0" * 64, rows=1) for n in range(99_999)
        ]
        started = time.monotonic()
        _check_files(store, PLAN, files, ())  # none of them is there, and nobody asks
        assert time.monotonic() - started < 5
        with pytest.raises(ValueError, match=r"listed twice: train-00007-of-99999\.parquet$"):
            _check_files(store, PLAN, [*files, files[7]], ())

    def test_infinite_metrics_survive(self, store: Store) -> None:
        publish(store, PLAN, files=[], counts={}, metrics={"psnr": float("inf")}, seconds=1)
        manifest = find(store, PLAN)
        assert manifest is not None
        assert manifest.metrics == {"psnr": float("inf")}
        text = folder_of(store, "images", PLAN.digest).read(MANIFEST)
        json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"unknown": 1}, "unknown"),
            ({"digest": "0" * 32}, "describes images/0"),
            ({"config": {"size": 64}}, "digest does not fit"),
            ({"files": [{"path": "x"}]}, r"files\.0\.size"),
            ({"schema_version": 2}, "schema_version"),
        ],
    )
    def test_damaged_manifest_is_named(self, store: Store, change: dict[str, object], named: str) -> None:
        made(store)
        folder = folder_of(store, "images", PLAN.digest)
        folder.write(MANIFEST, json.dumps(json.loads(folder.read(MANIFEST)) | change).encode())
        with pytest.raises(ValueError, match=named) as caught:
            find(store, PLAN)
        assert f"{folder.uri}/{MANIFEST}" in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_half_a_manifest_is_named(self, store: Store) -> None:
        folder = folder_of(store, "images", PLAN.digest)
        folder.write(MANIFEST, b'{"kind": "ima')
        with pytest.raises(ValueError, match=MANIFEST):
            find(store, PLAN)

    @pytest.mark.s3
    def test_on_s3(self, s3_store: Store) -> None:
        assert find(s3_store, PLAN) is None
        with ThreadPoolExecutor(4) as pool:
            manifests = list(pool.map(lambda _: made(s3_store), range(4)))
        assert all(manifest == find(s3_store, PLAN) for manifest in manifests)
        verify(s3_store, manifests[0])
        assert resolve(s3_store, f"{s3_store.uri}/{PLAN.prefix}") == manifests[0]


class TestVerify:
    def test_finds_changed_and_missing_files(self, store: Store) -> None:
        manifest = made(store)
        folder = folder_of(store, "images", PLAN.digest)
        verify(store, manifest)
        folder.write("data.bin", b"dato")
        with pytest.raises(ValueError, match=r"data\.bin is not what"):
            verify(store, manifest)
        folder.delete("data.bin")
        with pytest.raises(ValueError, match=r"data\.bin is missing"):
            verify(store, manifest)


SHARD = "train-00000-of-00001.parquet"


class TestReferences:
    """Files in another artifact's folder."""

    @pytest.fixture
    def entry(self, store: Store) -> FileEntry:
        """Make a shard of another artifact."""
        other = PLAN.model_copy(update={"version": 7})
        made = write_shard(folder_of(store, other.kind, other.digest), SHARD, b"rows", 4)
        return made.model_copy(update={"source": f"{other.prefix}/{SHARD}"})

    def test_are_read_where_they_are(self, store: Store, entry: FileEntry) -> None:
        own = put(folder_of(store, PLAN.kind, PLAN.digest), "own.bin", b"own")
        manifest = publish(store, PLAN, files=[entry, own], counts={}, metrics={}, seconds=1)
        assert find(store, PLAN) == manifest
        assert [store.read(key_of(manifest, file)) for file in manifest.files] == [b"own", b"rows"]
        assert key_of(PLAN, own) == f"{PLAN.prefix}/own.bin"
        verify(store, manifest)
        store.write(str(entry.source), b"raws")
        with pytest.raises(ValueError, match=rf"{entry.source} is not what"):
            verify(store, manifest)

    def test_are_checked_before_publishing(self, store: Store, entry: FileEntry) -> None:
        store.write(str(entry.source), b"more rows")
        with pytest.raises(ValueError, match=rf"changed since it was found: {entry.source}"):
            publish(store, PLAN, files=[entry], counts={}, metrics={}, seconds=1)
        store.delete(str(entry.source))
        with pytest.raises(ValueError, match=rf"not written: {entry.source}"):
            publish(store, PLAN, files=[entry], counts={}, metrics={}, seconds=1)
        assert find(store, PLAN) is None

    def test_are_the_same_file_for_two_runs(
        self, store: Store, entry: FileEntry, caplog: pytest.LogCaptureFixture
    ) -> None:
        """One run reused a shard, the other encoded it."""
        own = write_shard(folder_of(store, PLAN.kind, PLAN.digest), SHARD, b"rows", 4)
        first, second = (publish(store, PLAN, files=[e], counts={}, metrics={}, seconds=1) for e in (entry, own))
        assert first == second
        assert caplog.text == ""

    def test_leave_manifests_without_them_as_they_were(self, store: Store, entry: FileEntry) -> None:
        made(store)
        text = folder_of(store, "images", PLAN.digest).read(MANIFEST)
        assert b'"source"' not in text
        old = FileEntry.model_validate_json('{"path": "a", "size": 1, "sha256": "%s", "rows": null}' % ("0" * 64))
        assert old == FileEntry(path="a", size=1, sha256="0" * 64)
        assert old.as_json() == {"path": "a", "size": 1, "sha256": "0" * 64, "rows": None}
        assert FileEntry.model_validate_json(entry.model_dump_json()) == entry


class TestResolve:
    def test_every_way_to_name_an_artifact(self, store: Store) -> None:
        manifest = made(store)
        digest = PLAN.digest
        uri = folder_of(store, "images", digest).uri
        for text in (
            f"images/{digest}",
            f"images/{digest[:5]}",
            digest[:5],
            digest,
            uri,
            f"{uri}/{MANIFEST}",
            f"{uri}/",
        ):
            assert resolve(store, text) == manifest

    def test_unknown_lists_what_there_is(self, store: Store) -> None:
        with pytest.raises(ValueError, match="there are: none"):
            resolve(store, "ffff")
        made(store)
        for text in ("ffffff", "codes/", f"codes/{PLAN.digest}", "", "/", "s3://other/artifacts/images/0"):
            with pytest.raises(ValueError, match=f"no finished artifact.*images/{PLAN.digest}"):
                resolve(store, text)

    def test_ambiguous_lists_candidates(self, store: Store) -> None:
        plans = [
            ArtifactPlan(kind="images", version=1, config={"n": n}) for n in range(17)
        ]  # some two share a first digit
        for plan in plans:
            made(store, plan)
        first = [plan.digest[0] for plan in plans]
        digit = next(d for d in first if first.count(d) > 1)
        with pytest.raises(ValueError, match="is ambiguous") as caught:
            resolve(store, digit)
        assert all((plan.digest in str(caught.value)) == plan.digest.startswith(digit) for plan in plans)

    def test_unfinished_artifacts_are_not_meant(self, store: Store) -> None:
        folder_of(store, "images", PLAN.digest).write("data.bin", b"")
        with pytest.raises(ValueError, match="no finished artifact"):
            resolve(store, PLAN.digest)


class TestLineage:
    def test_goes_back_to_the_sources_and_says_what_is_gone(self, store: Store) -> None:
        images = made(store)
        inputs = {"images": ref_of(store, images), "teacher": ref("f")}
        codes = made(store, ArtifactPlan(kind="codes", version=1, config={}, inputs=inputs))
        last = made(store, ArtifactPlan(kind="report", version=1, config={}, inputs={"codes": ref_of(store, codes)}))
        tree = lineage(store, last)
        assert tree.manifest == last
        assert tree.inputs["codes"].inputs["images"].manifest == images
        assert tree.inputs["codes"].inputs["images"].inputs == {}
        assert tree.inputs["codes"].inputs["teacher"].manifest is None

    def test_follows_a_store_that_was_moved(self, store: Store, tmp_path: Path) -> None:
        images = made(store)
        codes = made(store, ArtifactPlan(kind="codes", version=1, config={}, inputs={"images": ref_of(store, images)}))
        moved = tmp_path / "moved"
        store.path.rename(moved)
        found = lineage(Store(moved), codes).inputs["images"].manifest
        assert found == images


class TestShards:
    def test_only_the_sidecar_says_done(self, store: Store) -> None:
        store.write("s.parquet", b"half")
        assert shard_entry(store, "s.parquet") is None
        entry = write_shard(store, "s.parquet", b"whole", 5)
        assert shard_entry(store, "s.parquet") == entry
        assert (entry.size, entry.rows, store.read("s.parquet")) == (5, 5, b"whole")
        assert store.list() == ["s.parquet", "s.parquet.json"]

    def test_a_second_writer_agrees_or_is_refused(self, store: Store) -> None:
        entry = write_shard(store, "s", b"whole", 5)
        assert write_shard(store, "s", b"whole", 5) == entry
        with pytest.raises(ValueError, match="two runs disagree"):
            write_shard(store, "s", b"other", 5)
        assert store.read("s") == b"whole"

    def test_a_foreign_sidecar_is_named(self, store: Store) -> None:
        write_shard(store, "a", b"", 0)
        store.write("b.json", store.read("a.json"))
        with pytest.raises(ValueError, match="is the sidecar of 'a'"):
            shard_entry(store, "b")


class TestProvenance:
    @pytest.mark.parametrize(
        ("argument", "kept"),
        [
            ("hub.token=abc", "hub.token=***"),
            ("--password=abc", "--password=***"),
            ("AWS_SECRET_ACCESS_KEY=abc", "AWS_SECRET_ACCESS_KEY=***"),
            ("apiToken=abc", "apiToken=***"),
            ("s3://me:hunter2@bucket/x", "s3://***@bucket/x"),
            ("https://host/x?X-Amz-Signature=abc&n=1", "https://host/x?X-Amz-Signature=***&n=1"),
            ("tokenizer.num_tokens=16", "tokenizer.num_tokens=16"),
            ("s3://bucket/x", "s3://bucket/x"),
        ],
    )
    def test_secrets_of_the_command_line_are_hidden(self, argument: str, kept: str) -> None:
        line = redact(["/home/me/bin/sftok", "run", argument])
        assert line.replace("'", "") == f"sftok run {kept}"

    def test_a_secret_after_its_option_is_hidden(self) -> None:
        line = redact(["sftok", "--token", "abc", "--seed", "1", "--key", "--json"])
        assert line == "sftok --token '***' --seed 1 --key --json"

    def test_revision_is_the_source_s_and_not_the_user_s(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        source = tmp_path / "clone"
        file = source / "infra" / "artifacts" / "made_with.py"
        file.parent.mkdir(parents=True)
        file.write_text("")
        monkeypatch.setattr(made_with, "__file__", str(file))
        git(source, "init", "-q")
        made_with.git_revision.cache_clear()
        assert made_with.git_revision() is None  # inside a repository that does not track it

        git(source, "add", ".")
        git(source, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("GIT_DIR", "/nowhere")
        made_with.git_revision.cache_clear()
        revision = made_with.git_revision()
        assert revision is not None
        assert re.fullmatch("[0-9a-f]{40}", revision)

        file.write_text("changed")
        made_with.git_revision.cache_clear()
        assert made_with.git_revision() == f"{revision}-dirty"
        made_with.git_revision.cache_clear()


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", "-C", str(folder), *arguments], check=True)


def test_importing_the_ground_floor_is_cheap() -> None:
    heavy = ("torch", "ray", "s3fs", "botocore", "numpy", "pyarrow", "prefect")
    modules = ("store.store", "artifacts.manifest", "training.checkpoint", "compute.workers", "settings", "machine")
    imports = ", ".join(f"infra.{module}" for module in modules)
    script = f"import sys, {imports}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
