"""Runs and commands that are killed at random moments: the right exit code, nothing left behind, the same bytes."""

import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

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
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def killed(process: subprocess.Popen[str], chance: random.Random, longest: float) -> bool:
    """Send a signal, sometimes twice, at a random moment; return whether the process had not ended before."""
    try:
        process.communicate(timeout=chance.uniform(0, longest))
    except subprocess.TimeoutExpired:
        pass
    else:
        assert process.returncode == 0
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
    assert not left_behind(process.pid, 60)  # Ray's agents look for their raylet every now and then
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
    "report": ("report", "{run}", "--store", "{store}"),
    "cp": ("cp", "evaluation/{evaluate}", "{target}", "--inputs", "--store", "{store}"),
    "gc": ("gc", "--older-than", "0h", "--grace", "0h", "--keep-last", "1", "--store", "{store}"),
    "verify": ("verify", "codes/{encode}", "--store", "{store}"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_killed_at_random_moments_is_simply_repeated(name: str, reference: Reference, tmp_path: Path) -> None:
    chance, store, target = random.Random(0), Store(tmp_path / "store"), Store(tmp_path / "target")
    shutil.copytree(reference.store.path, store.path)
    digests = {stage: made["digest"] for stage, made in reference.result["stages"].items()}
    words = {"run": reference.result["run"], "store": store.uri, "target": target.uri, **digests}
    command = [str(Path(sys.executable).parent / "sftok"), *(word.format(**words) for word in COMMANDS[name])]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            env=reference.runner.environment,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    for _ in range(SHORT):
        killed(start(), chance, 3)
    last = start()
    _, err = last.communicate(timeout=PATIENCE)
    assert last.returncode == 0, err[-2000:]
    assert_same(store, reference.result, reference)
    if name == "cp":
        for stage in ("evaluate", "encode", "prepare"):
            assert target.at("artifacts", reference.result["stages"][stage]["kind"], digests[stage]).list()
