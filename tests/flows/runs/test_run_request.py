"""A run's request: stored whole in its record, and asked for again by the command that is printed and by `rerun`."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from flows.cli import launch
from flows.cli.main import main
from flows.recipes.ablations import load_ablation
from flows.recipes.files import load_recipe, to_toml
from flows.recipes.registry import RECIPES
from flows.requests import checks
from flows.runs.command_line import command_line
from flows.runs.journal import RunRecord, read_record, start_journal
from flows.runs.run_request import RunArguments, RunRequest
from infra.artifacts.manifest import ArtifactRef
from infra.compute.rank_count import ONE, RankCount
from infra.store.store import Store

Asked = Callable[[str], RunRequest]

OVERRIDES = (
    "teacher.training.steps=3",
    "align.training.optimizer.lr=0.0003",
    "sample.cfg_scale=1.5",
    'encode.variants=["center", "flip"]',
    "encode.precision=bf16",
    "encode.compile=true",
    "decoding.precision=fp32",
    "data.max_reject_rate=0.25",
    'description=it\'s a "trial", 日本 😀',
    "compute.fp32=tf32",
    "align.from_scratch=true",
    "evaluate.sweep.cfg_scales=[]",
)
SOURCES = ("sklearn:digits", "/data/my images", "webdataset:s3://bucket/{0..9}.tar", "/data/'q\"uoted' $HOME/日本")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """The request that a command line makes; nothing is checked or run, and the device is the one that is named."""
    found: list[RunRequest] = []

    def checked(request: RunRequest, **_: object) -> RunRequest:
        return request if request.device == "auto" else request.on(request.device, request.gpus_per_worker)

    def launched(request: RunRequest, *, verbose: bool) -> None:
        found.append(request)
        raise SystemExit(0)

    def ask(command: str) -> RunRequest:
        words = shlex.split(command)
        assert words[0] == "sftok"
        with pytest.raises(SystemExit) as ended:
            main(words[1:])
        assert ended.value.code == 0
        return found.pop()

    monkeypatch.setattr(checks, "checked", checked)
    monkeypatch.setattr(launch, "launch", launched)
    return ask


@st.composite
def requests(draw: st.DrawFn) -> RunRequest:
    """Whole runs as people ask for them; on "auto" as they are asked for, else as they are run."""
    device = draw(st.sampled_from(["auto", "cpu", "cuda"]))
    overrides = draw(st.lists(st.sampled_from(OVERRIDES), unique=True))
    arguments = RunArguments(
        recipe=draw(st.sampled_from(sorted(RECIPES))),
        store=draw(st.sampled_from(["/srv/my store", "s3://bucket/prefix"])),
        data=draw(st.sampled_from(SOURCES)),
        seed=draw(st.none() | st.integers(0, 2**40)),
        overrides=(*overrides, f"compute.device={device}"),
        workers=draw(st.integers(0, 300)),
        gpus_per_worker=draw(st.none() | st.floats(0, 1)) if device == "auto" else draw(st.floats(0, 1)),
        ranks=draw(st.sampled_from([1, 4, "2:8", "7"])),
        anew=draw(st.booleans()),
    )
    request = arguments.request()
    return request if device == "auto" else request.on(device, request.gpus_per_worker)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(request=requests())
def test_the_printed_command_asks_for_the_same(asked: Asked, request: RunRequest) -> None:
    command = request.command("a-run")
    assert command.startswith(f"sftok run {request.recipe.name} ")
    assert asked(command) == request


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(request=requests())
def test_a_rerun_asks_for_the_same(asked: Asked, tmp_path: Path, request: RunRequest) -> None:
    kept = request.changed(store=Store(tmp_path / "store").uri)
    record_of(kept)
    assert asked(f"sftok rerun a-run --store {shlex.quote(kept.store)}") == kept
    assert asked(f"sftok rerun a-run --store {shlex.quote(kept.store)} --anew") == kept.changed(anew=True)


def record_of(request: RunRequest, run: str = "a-run") -> RunRecord:
    journal = start_journal(request, run)
    journal._write()
    return journal.record


def wide(store: Store, **changes: object) -> RunRequest:
    """A run on two GPUs and four ranks."""
    recipe = load_recipe("digits", overrides=["align.training.micro_batch=16"], seed=7).on("cuda")
    facts = {"workers": 3, "gpus_per_worker": 0.5, "ranks": RankCount(4, 4), "anew": True}
    return RunRequest(recipe=recipe, store=store.uri, source="/data/images").changed(**{**facts, **changes})


def test_the_record_holds_the_request_whole(store: Store) -> None:
    request = wide(store)
    assert record_of(request).request == request
    assert read_record(store, "a-run").request == request
    written = json.loads(store.read("runs/a-run/run.json"))
    assert (written["workers"], written["gpus_per_worker"], written["ranks"], written["anew"]) == (3, 0.5, 4, True)
    assert written["recipe"]["compute"]["device"] == "cuda"


def refs() -> tuple[ArtifactRef, ArtifactRef]:
    ref = {"uri": "x", "digest": "0" * 32}
    return ArtifactRef(kind="tokenizer", **ref), ArtifactRef(kind="codes", content_digest="1" * 32, **ref)


@pytest.mark.parametrize(
    "changes",
    [
        {"last": "encode", "given": {"fine_tune": refs()[0]}},
        {"last": "train_generator", "given": {"encode": refs()[1]}},
        {"recipe": load_recipe("digits", overrides=["name=mine"]).on("cuda")},
        {"last": "align", "ablation": load_ablation("digits_ablation")},
    ],
    ids=["encode", "train-generator", "recipe of a file", "ablation"],
)
def test_what_no_command_says_the_record_does(asked: Asked, store: Store, changes: dict) -> None:
    request = wide(store, **changes)
    command = record_of(request).request.command("a-run")
    assert command == f"sftok rerun a-run --store {store.uri}"
    assert asked(command) == request.on(request.device, request.gpus_per_worker)


def test_a_recipe_of_a_file_is_kept_when_the_file_is_gone(asked: Asked, store: Store, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(to_toml(RECIPES["digits"]()).replace('name = "digits"', 'name = "mine"'))
    first = asked(f"sftok run {file} --store {store.uri} --seed 3 --device cpu --gpus-per-worker 0 --ranks 2")
    file.unlink()
    assert asked(record_of(first).request.command("a-run")) == first
    assert first.recipe.seed == 3


class TestEarlierVersions:
    def write(self, store: Store, stages: dict[str, object], **changes: object) -> None:
        record = json.loads(record_of(wide(store)).model_dump_json())
        for name in set(RunRequest.model_fields) - {"recipe", "store", "source", "workers"}:
            del record[name]
        record |= {"stages": stages, "state": "Completed", **changes}
        store.write("runs/a-run/run.json", json.dumps(record).encode())

    def test_their_records_can_be_read_and_run_again(self, asked: Asked, store: Store) -> None:
        self.write(store, {"prepare": {"state": "Completed"}})
        request = asked(f"sftok rerun a-run --store {store.uri}")
        assert request == wide(store, gpus_per_worker=None, ranks=ONE, anew=False)

    @pytest.mark.parametrize("stages", [["train_generator"], ["prepare", "SFVR, seed 0: teacher"]])
    def test_a_part_of_a_run_that_does_not_say_so_is_refused(self, store: Store, stages: list[str]) -> None:
        self.write(store, {name: {"state": "Completed"} for name in stages})
        with pytest.raises(ValueError, match=f"run a-run made {', '.join(stages)} alone: run the command that made it"):
            checks.check_rerun("a-run", store=store.uri)

    def test_a_recipe_of_another_version_is_refused_in_a_line(self, store: Store) -> None:
        self.write(store, {}, recipe={"name": "digits"})
        with pytest.raises(ValueError, match=r"^run a-run was written by another version \(recipe\.data differs\)"):
            checks.check_rerun("a-run", store=store.uri)


class TestSecrets:
    def test_a_request_takes_none_from_the_environment(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("AWS_SECRET_ACCESS_KEY", "SFTOK_SIGNING_KEY", "PREFECT_API_KEY"):
            monkeypatch.setenv(name, "canary-0451")
        request = RunArguments(recipe="digits", store=store.uri).request()
        assert "canary-0451" not in record_of(request).model_dump_json() + request.command("a-run")

    def test_credentials_in_places_are_refused(self, store: Store) -> None:
        with pytest.raises(ValidationError, match="carries credentials"):
            RunRequest(recipe=load_recipe("digits"), store=store.uri, source="webdataset:s3://key:canary@bucket/x.tar")
        with pytest.raises(ValueError, match="credentials"):
            RunArguments(recipe="digits", store="s3://key:canary@bucket/x").request()

    def test_no_command_prints_them(self) -> None:
        assert "canary" not in command_line(["sftok", "run", "digits"], data="s3://key:canary@bucket/x")


def test_a_range_of_ranks_takes_the_cores_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster of the run's own is told how many processes it has room for, so a range would always get its most."""
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    request = RunRequest(recipe=load_recipe("digits_tiny"), store="store", source="sklearn:digits")
    found = {text: request.changed(ranks=RankCount.parse(text)).processes for text in ("1", "4", "1:64", "4:64", "1:2")}
    assert found == {"1": 1, "4": 4, "1:64": 2, "4:64": 4, "1:2": 2}
