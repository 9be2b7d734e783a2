"""Two ranks train as one does, and go on after one of them was killed."""

import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load

from infra.compute.cluster import session
from infra.compute.ranks import ALONE, Ranks, run_ranks
from infra.progress import Progress
from infra.store.store import Store
from infra.training.loop import TrainingRun, TrainResult
from tests.sftok.training.test_stages import STAGES, losses

STEPS = 8


class Shared(NamedTuple):
    """What two ranks made of every stage, one after the other in the same processes."""

    store: Store
    results: dict[str, TrainResult]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    store = Store(tmp_path_factory.mktemp("both"))
    with session(num_cpus=2):
        yield Shared(store, run_ranks(partial(train_all, store), 2))


def train_all(store: Store, ranks: Ranks, progress: Progress) -> dict[str, TrainResult]:
    return {stage: train(stage, store.at(stage), ranks) for stage in STAGES}


def train(stage: str, folder: Store, ranks: Ranks) -> TrainResult:
    run = TrainingRun(folder, seed=0, ranks=ranks)
    return STAGES[stage](run, STEPS, checkpoint_every=2, batch_size=12, micro_batch=3)


def train_and_die(stage: str, folder: Store, victim: Path, ranks: Ranks, progress: Progress) -> TrainResult:
    """A stage in one rank; the second rank kills itself within the step after the first checkpoint, once."""

    class Doomed(Ranks):
        def total(self, tensor: torch.Tensor, group: object = None) -> torch.Tensor:
            if any(name.endswith("checkpoint.json") for name in folder.list("checkpoints")):
                victim.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().total(tensor, group)

    return train(stage, folder, Doomed(*ranks) if ranks.rank == 1 and not victim.exists() else ranks)


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_learn_what_one_learns(stage: str, store: Store, both: Shared) -> None:
    alone, two = train(stage, store, ALONE), both.store.at(stage)
    assert losses(two) == pytest.approx(losses(store), rel=1e-4)
    found, wanted = (
        {name: value for name, value in result.metrics.items() if name.startswith("val_")}
        for result in (both.results[stage], alone)
    )
    assert found == pytest.approx(wanted, rel=1e-3)
    assert [file.path for file in both.results[stage].files] == [file.path for file in alone.files]
    ours, theirs = (load(folder.read("model.safetensors")) for folder in (store, two))
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < 5e-3


@pytest.mark.parametrize("stage", STAGES)
def test_one_rank_goes_on_from_what_two_have_saved(stage: str, store: Store, both: Shared) -> None:
    two = both.store.at(stage)
    for key in two.list("checkpoints/"):
        store.write(key, two.read(key))
    done: list[int] = []
    run = TrainingRun(store, seed=0, progress=lambda step, total, figures: done.append(step))
    STAGES[stage](run, STEPS, checkpoint_every=2, batch_size=12, micro_batch=3)
    assert done == [STEPS - 1, STEPS]
    assert losses(store)[:-2] == losses(two)[:-2]
    assert losses(store) == pytest.approx(losses(two), rel=1e-4)
    ours, theirs = (load(folder.read("model.safetensors")) for folder in (store, two))
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < 5e-3


@pytest.mark.parametrize("stage", ["align", *(pytest.param(s, marks=pytest.mark.slow) for s in STAGES if s != "align")])
def test_a_killed_rank_is_recovered_from_the_checkpoint(stage: str, store: Store, tmp_path: Path, both: Shared) -> None:
    run_ranks(partial(train_and_die, stage, store, tmp_path / "died"), 2)
    assert (tmp_path / "died").exists()
    assert losses(store) == losses(both.store.at(stage))
    assert store.read("model.safetensors") == both.store.at(stage).read("model.safetensors")
