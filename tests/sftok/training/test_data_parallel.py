"""Two ranks train as one does, and go on after one of them was killed."""

import json
import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load

from infra.compute.cluster import session
from infra.compute.ranks import Ranks, run_ranks
from infra.progress import Progress
from infra.store.store import Store
from infra.training.loop import TrainingRun, TrainResult
from tests.sftok.training.test_stages import STAGES

PARTS = {"batch_size": 12, "micro_batch": 3}


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    with session(num_cpus=2):
        yield


def train(stage: str, steps: int, folder: Store, victim: Path | None, ranks: Ranks, progress: Progress) -> TrainResult:
    """A stage in one rank; the second rank kills itself in the middle, once."""

    def listen(done: int, total: int, figures: object) -> None:
        progress(done, total, {})

    run = TrainingRun(folder, seed=0, progress=listen, ranks=ranks)
    if victim is not None and ranks.rank == 1 and not victim.exists():
        _die_when(folder, victim)
    return STAGES[stage](run, steps, checkpoint_every=2, **PARTS)


def _die_when(folder: Store, victim: Path) -> None:
    """Kill this process as soon as the first checkpoint is complete."""
    import threading
    import time

    def watch() -> None:
        while not any(name.endswith("checkpoint.json") for name in folder.list("checkpoints")):
            time.sleep(0.001)
        victim.touch()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def losses(folder: Store) -> list[float]:
    return [json.loads(line)["loss"] for line in folder.read("log.jsonl").decode().splitlines()]


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_learn_what_one_learns(stage: str, store: Store) -> None:
    one, two = store.at("one"), store.at("two")
    alone = train(stage, 4, one, None, Ranks(), lambda *_: None)
    both = run_ranks(partial(train, stage, 4, two, None), 2)
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    found, wanted = (
        {name: value for name, value in result.metrics.items() if name.startswith("val_")} for result in (both, alone)
    )
    assert found == pytest.approx(wanted, rel=1e-3)
    assert [file.path for file in both.files] == [file.path for file in alone.files]
    ours, theirs = (load(folder.read("model.safetensors")) for folder in (one, two))
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < 5e-3


@pytest.mark.parametrize("stage", ["align", *(pytest.param(s, marks=pytest.mark.slow) for s in STAGES if s != "align")])
def test_a_killed_rank_is_recovered_from_the_checkpoint(stage: str, store: Store, tmp_path: Path) -> None:
    whole, parts = store.at("whole"), store.at("parts")
    run_ranks(partial(train, stage, 30, whole, None), 2)
    run_ranks(partial(train, stage, 30, parts, tmp_path / "died"), 2)
    assert (tmp_path / "died").exists()
    assert losses(parts) == losses(whole)
    assert parts.read("model.safetensors") == whole.read("model.safetensors")
