"""The whole pipeline as a user runs it: every stage and server is real, in processes of their own.

One run is the reference; others are killed, run on other workers or in another store, and must end with the same bytes.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from flows.cli.main import main
from flows.pipeline import graph
from flows.pipeline.space import Sizes
from flows.recipes.files import load_recipe
from infra.artifacts.lineage import resolve
from infra.artifacts.manifest import verify
from infra.codes.contract import read_codes
from infra.store.store import Store
from tests.support.s3_server import S3Server

STAGES = [
    "prepare", "teacher", "warm_up", "align", "fine_tune", "encode", "train_generator", "sample",
    "train_second_generator", "evaluate", "report",
]  # fmt: skip
VARIANTS = ["center", *(f"affine-{k}" for k in range(1, 6))]
# Long enough to be killed in the middle of it, with few images to validate on.
SETTINGS = {"align.training.steps": "24", "encode.variants": json.dumps(VARIANTS), "data.val_fraction": "0.05"}
OVERRIDES = [f"{key}={value}" for key, value in SETTINGS.items()]
RUN = ["run", "digits_tiny", "--json", *(word for override in OVERRIDES for word in ("--set", override))]
PATIENCE = 240  # seconds

pytestmark = pytest.mark.timeout(600)


class Runner:
    """Starts `sftok run digits_tiny` with a home of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SFTOK_HOME": str(folder / "home")}
        for name in ("PREFECT_API_URL", "RAY_ADDRESS", "SFTOK_STORE"):
            self.environment.pop(name, None)

    def start(self, store: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(Path(sys.executable).parent / "sftok"), *RUN, "--store", store, *arguments],
            env={**self.environment, **environment},
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, store: str, *arguments: str, **environment: str) -> dict[str, Any]:
        process = self.start(store, *arguments, **environment)
        out, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, err[-3000:]
        assert not left_behind(process.pid)
        result: dict[str, Any] = json.loads(out)
        return result


def left_behind(session: int, seconds: float = 15) -> list[psutil.Process]:
    """Processes of a session that outlive it; what Ray and Prefect start may take a moment to go."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        alive = [p for p in psutil.process_iter() if _session_of(p) == session and p.status() != psutil.STATUS_ZOMBIE]
        if not alive:
            return []
        time.sleep(0.2)
    return alive


def _session_of(process: psutil.Process) -> int | None:
    try:
        return os.getsid(process.pid)
    except (ProcessLookupError, PermissionError):
        return None


def kill_when(process: subprocess.Popen[str], is_time: Callable[[], bool]) -> None:
    """kill -9 of the whole process group."""
    deadline = time.monotonic() + PATIENCE
    while not is_time():
        assert process.poll() is None, f"it ended before it was killed: {process.communicate()[1][-3000:]}"
        assert time.monotonic() < deadline, "the moment to kill it never came"
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def files_of(store: Store, result: dict[str, Any], stage: str) -> dict[str, str]:
    """Path and sha256 of every file of a stage's artifact, after reading them again."""
    manifest = resolve(store, result["stages"][stage]["digest"])
    verify(store, manifest)
    return {file.path: file.sha256 for file in manifest.files}


def assert_same(store: Store, result: dict[str, Any], reference: "Reference") -> None:
    for stage in STAGES[:-1]:  # the report states run and time
        assert result["stages"][stage]["digest"] == reference.result["stages"][stage]["digest"], stage
        assert files_of(store, result, stage) == files_of(reference.store, reference.result, stage), stage
    assert result["metrics"] == reference.result["metrics"]


class Reference:
    """An undisturbed run with two workers."""

    def __init__(self, folder: Path) -> None:
        self.runner = Runner(folder)
        self.store = Store(folder / "reference")
        self.result = self.runner.run(self.store.uri, "--workers", "2")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, give_database: Callable[[Path], Path]) -> Reference:
    folder = tmp_path_factory.mktemp("whole")
    give_database(folder / "home")
    return Reference(folder)


def test_every_stage_is_made_and_verifies(reference: Reference) -> None:
    stages = reference.result["stages"]
    assert list(stages) == STAGES
    assert {stage["state"] for stage in stages.values()} == {"Completed"}
    for stage in STAGES:
        assert files_of(reference.store, reference.result, stage)
    page = Path(reference.result["report"]).read_text()
    assert "FD (random features)" in page
    assert reference.result["metrics"]["generation.class_agreement_shuffled"] < 0.5


def test_a_run_that_learnt_nothing_says_so(reference: Reference, capsys: pytest.CaptureFixture[str]) -> None:
    """It is Completed for all that: its page, its last lines, its record and `sftok show` say what it lacks."""
    found = reference.result["findings"]
    rules = [one["rule"] for one in found]
    assert {"codebook", "reconstructions-blind", "generator-blind", "classes-ignored", "still-falling"} <= set(rules)
    assert [one["severity"] for one in found] == sorted((one["severity"] for one in found), reverse=True)
    page = json.loads(Path(reference.result["report"]).with_suffix(".json").read_text())
    assert page["findings"] == found
    assert '<section id="first">' in Path(reference.result["report"]).read_text()
    run = reference.result["run"]
    assert json.loads(reference.store.read(f"runs/{run}/run.json"))["findings"] == found
    with pytest.raises(SystemExit, match="0"):
        main(["show", run, "--store", reference.store.uri])
    told = capsys.readouterr().out
    assert "what to look at first:" in told
    for one in found:
        assert f"{one['severity']}: {one['sentence']}" in told
        assert f"try: {one['remedies'][0]}" in told


def test_the_codes_are_those_of_all_images_and_variants(reference: Reference) -> None:
    digest = reference.result["stages"]["encode"]["digest"]
    manifest = resolve(reference.store, f"codes/{digest}")
    info, rows = read_codes(reference.store.at("artifacts", "codes", digest), [f.path for f in manifest.files])
    counts = resolve(reference.store, reference.result["stages"]["prepare"]["digest"]).counts
    assert counts["found"] == 1797 == counts["accepted"] + counts["rejected"]
    assert len(rows.image_id) == counts["train"] * len(VARIANTS) + counts["val"]
    assert len(set(zip(rows.image_id, rows.variant, strict=True))) == len(rows.image_id)
    assert info.tokenizer == reference.result["stages"]["fine_tune"]["digest"]


def test_stages_take_the_space_that_is_estimated(reference: Reference) -> None:
    recipe = load_recipe("digits_tiny", overrides=OVERRIDES)
    counts = resolve(reference.store, reference.result["stages"]["prepare"]["digest"]).counts
    sizes = Sizes.of(recipe, counts["accepted"], counts["classes"]).artifacts
    for stage in ("teacher", "align", "fine_tune", "encode", "train_generator", "sample"):
        found = resolve(reference.store, reference.result["stages"][stage]["digest"]).num_bytes
        assert found < 2 * sizes[stage] + 200_000, (stage, found, sizes[stage])  # a file has a head
        if stage in ("teacher", "fine_tune"):  # small codebooks are packed into less, and there are few classes
            assert found > 0.5 * sizes[stage], (stage, found, sizes[stage])


def test_a_second_run_finds_everything_done(
    reference: Reference, prefect_api: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, on a server that is there: others are begun as a user begins them."""
    before = reference.store.list("artifacts")
    monkeypatch.delenv("SFTOK_STORE", raising=False)
    with pytest.raises(SystemExit, match="0"):
        main([*RUN, "--store", reference.store.uri, "--workers", "2"])
    again = json.loads(capsys.readouterr().out)
    assert {stage["state"] for stage in again["stages"].values()} == {"Cached"}
    assert again["metrics"] == reference.result["metrics"]
    assert again["findings"] == reference.result["findings"]
    assert reference.store.list("artifacts") == before


def test_killed_in_training_and_in_encoding_it_ends_with_the_same_bytes(reference: Reference, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    digests = {stage: reference.result["stages"][stage]["digest"] for stage in STAGES}
    align, codes = (
        store.at("artifacts", "tokenizer", digests["align"]),
        store.at("artifacts", "codes", digests["encode"]),
    )

    checkpoints = align.at("checkpoints")
    often = ("--set", "align.training.checkpoint_every=2")
    faster = ("--workers", "1", *often)
    kill_when(
        reference.runner.start(store.uri, "--workers", "0", *often),
        lambda: any(name.endswith("checkpoint.json") for name in checkpoints.list()),
    )
    assert not align.exists("manifest.json")

    kill_when(
        reference.runner.start(store.uri, *faster),
        lambda: any(name.endswith(".parquet.json") for name in codes.list()),
    )
    assert align.exists("manifest.json")
    assert not codes.exists("manifest.json")
    done = {name: codes.path.joinpath(name).stat().st_mtime_ns for name in codes.list() if name.endswith(".json")}

    result = reference.runner.run(store.uri, *faster)
    assert_same(store, result, reference)
    assert result["stages"]["align"]["state"] == "Cached"
    assert {name: codes.path.joinpath(name).stat().st_mtime_ns for name in done} == done  # not encoded again


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage", ["teacher", "warm_up", "fine_tune", "train_generator", "sample", "train_second_generator"]
)
def test_killed_in_any_other_stage_it_ends_with_the_same_bytes(
    stage: str, reference: Reference, tmp_path: Path
) -> None:
    store = Store(tmp_path / "store")
    kind = graph.GRAPH[stage].kind
    folder = store.at("artifacts", kind, reference.result["stages"][stage]["digest"])
    mark = ".parquet.json" if stage == "sample" else "checkpoint.json"
    kill_when(
        reference.runner.start(store.uri, "--workers", "1"),
        lambda: any(name.endswith(mark) for name in folder.list()),
    )
    assert_same(store, reference.runner.run(store.uri, "--workers", "1"), reference)


@pytest.mark.slow
def test_own_images_run_and_what_is_no_image_is_listed(tmp_path: Path) -> None:
    """Three classes with awkward names, no splits, a file that only looks like an image; the locale is not UTF-8."""
    data, random = tmp_path / "my images", np.random.default_rng(0)
    for label, name in enumerate(("<b>cats</b>", "hôtel & co", "日本")):
        (data / name).mkdir(parents=True)
        for number in range(24):
            pixels = random.integers(0, 80, (40, 56, 3), np.uint8) + np.uint8(80 * label)
            Image.fromarray(pixels).save(data / name / f"{number}.png")
    (data / "日本" / "broken.jpg").write_bytes(b"no image at all")
    runner = Runner(tmp_path)
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    arguments = ("--data", str(data), "--workers", "1", "--set", "evaluate.steps=[1]")
    result = runner.run(str(tmp_path / "store"), *arguments, **locale)
    assert {stage["state"] for stage in result["stages"].values()} == {"Completed"}
    counts = resolve(Store(tmp_path / "store"), result["stages"]["prepare"]["digest"]).counts
    assert counts["found"] == 73
    assert (counts["accepted"], counts["rejected"], counts["classes"]) == (72, 1, 3)
    page = Path(result["report"]).read_text()
    assert "hôtel &amp; co" in page
    assert "<b>cats</b>" not in page


@pytest.mark.slow
@pytest.mark.s3
def test_a_run_on_s3_ends_with_the_same_bytes(reference: Reference, s3_env: S3Server, s3_store: Store) -> None:
    result = reference.runner.run(s3_store.uri, "--workers", "2", **s3_env.environment)
    assert_same(s3_store, result, reference)
    assert result["report"].startswith("s3://")
    secret = s3_env.environment["AWS_SECRET_ACCESS_KEY"].encode()
    assert not [name for name in s3_store.list() if secret in s3_store.read(name)]
