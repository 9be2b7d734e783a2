"""Runs and commands that are killed at random moments: the right exit code, nothing left behind, the same bytes."""

import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from flows.pipeline import graph
from infra.artifacts.lineage import resolve
from infra.artifacts.manifest import verify
from infra.store.store import Store
from tests.flows.pipeline.test_whole_run import PATIENCE, Reference, assert_same, left_behind, reference

__all__ = ["reference"]

# Exit codes that each signal may lead to; the system's own until Python has begun.
CODES = {
    signal.SIGINT: {130, -signal.SIGINT},
    signal.SIGTERM: {143, -signal.SIGTERM},
    signal.SIGHUP: {129, -signal.SIGHUP},
    signal.SIGKILL: {-signal.SIGKILL},
}
RUNS = 20  # seeds
KILLS = 12  # per seed, of runs
SHORT = 15  # kills of each command that takes seconds
ABLATION = (
    "ablation",
    "digits_tiny",
    "--workers",
    "0",
    "--seeds",
    "0",
    "--set",
    "align.training.steps=12",
    "--set",
    "evaluate.steps=[1]",
)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def killed(process: subprocess.Popen[str], chance: random.Random, longest: float) -> bool:
    """Send a signal, sometimes twice, at a random moment; return whether the process had not ended before."""
    try:
        _, err = process.communicate(timeout=chance.uniform(0, longest))
    except subprocess.TimeoutExpired:
        pass
    else:
        assert process.returncode == 0, err[-2000:]
        return False
    sent = chance.choice(list(CODES))
    process.send_signal(sent)
    if sent == signal.SIGINT and chance.random() < 0.5:
        try:
            process.wait(chance.uniform(0, 1))
        except subprocess.TimeoutExpired:
            process.send_signal(sent)
    _, err = process.communicate(timeout=PATIENCE)
    if process.returncode == 0:  # it came after the last line
        return False
    assert process.returncode in CODES[sent], (sent, process.returncode, err[-2000:])
    if process.returncode > 0 and sent != signal.SIGKILL:
        assert "the same command resumes from here" in err, (sent, err[-2000:])
        assert "Traceback" not in err, err[-3000:]
    assert not left_behind(process.pid, 150)  # Ray's agents wait a minute for the head before they give up
    return True


@pytest.mark.parametrize("seed", range(RUNS))
def test_a_run_killed_at_random_moments_ends_with_the_same_bytes(
    seed: int, reference: Reference, tmp_path: Path
) -> None:
    chance, store = random.Random(seed), Store(tmp_path / "store")
    for _ in range(KILLS):
        workers = chance.choice(("0", "1"))
        if not killed(reference.runner.start(store.uri, "--workers", workers), chance, 40):
            shutil.rmtree(store.path)
    assert_same(store, reference.runner.run(store.uri, "--workers", "1"), reference)


COMMANDS: dict[str, Sequence[str]] = {
    "report": ("report", "--run", "{run}", "--store", "{store}"),
    "cp": ("cp", "evaluation/{evaluate}", "{target}", "--inputs", "--store", "{store}"),
    "gc": ("gc", "--older-than", "0h", "--grace", "0h", "--keep-last", "1", "--store", "{store}"),
    "verify": ("verify", "codes/{encode}", "--store", "{store}"),
}


def start(reference: Reference, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start a command in a session of its own."""
    return subprocess.Popen(
        [str(Path(sys.executable).parent / "sftok"), *arguments],
        env=reference.runner.environment,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(reference: Reference, folder: Path, *arguments: str) -> None:
    """Run a command to its end."""
    process = start(reference, folder, *arguments)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err[-2000:]


def all_files(store: Store) -> dict[str, dict[str, str]]:
    """Path and sha256 of every file of every artifact but the reports, which state run and time."""
    folders = {
        name.removesuffix("/manifest.json") for name in store.list("artifacts") if name.endswith("manifest.json")
    }
    refs = sorted("/".join(folder.split("/")[-2:]) for folder in folders)
    manifests = {ref: resolve(store, ref) for ref in refs if "report/" not in ref}
    for manifest in manifests.values():
        verify(store, manifest)
    return {ref: {file.path: file.sha256 for file in manifest.files} for ref, manifest in manifests.items()}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_killed_at_random_moments_is_simply_repeated(name: str, reference: Reference, tmp_path: Path) -> None:
    chance, store, target = random.Random(0), Store(tmp_path / "store"), Store(tmp_path / "target")
    shutil.copytree(reference.store.path, store.path)
    digests = {stage: made["digest"] for stage, made in reference.result["stages"].items()}
    words = {"run": reference.result["run"], "store": store.uri, "target": target.uri, **digests}
    arguments = [word.format(**words) for word in COMMANDS[name]]
    for _ in range(SHORT):
        killed(start(reference, tmp_path, *arguments), chance, 3)
    finish(reference, tmp_path, *arguments)
    assert_same(store, reference.result, reference)
    if name == "cp":
        for stage in ("evaluate", "encode", "prepare"):
            assert target.at("artifacts", graph.GRAPH[stage].kind, digests[stage]).list()


def test_an_ablation_killed_at_random_moments_ends_with_the_same_bytes(reference: Reference, tmp_path: Path) -> None:
    chance, stores = random.Random(0), [Store(tmp_path / name) for name in ("undisturbed", "killed")]
    for store in stores:
        shutil.copytree(reference.store.path, store.path)
    finish(reference, tmp_path, *ABLATION, "--store", stores[0].uri)
    for _ in range(SHORT):
        killed(start(reference, tmp_path, *ABLATION, "--store", stores[1].uri), chance, 30)
    finish(reference, tmp_path, *ABLATION, "--store", stores[1].uri)
    undisturbed = all_files(stores[0])
    assert len(undisturbed) > len(all_files(reference.store))
    assert all_files(stores[1]) == undisturbed
