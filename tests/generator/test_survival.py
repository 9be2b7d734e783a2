"""Trainings by several ranks that are disturbed end with the weights of one that was left alone."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import torch
from safetensors.torch import load

from generator.config import GeneratorConfig
from generator.train import train_generator
from infra.compute.cluster import session
from infra.compute.ranks import Ranks, run_ranks
from infra.progress import Progress, silent
from infra.store.store import Store
from infra.training.loop import TrainingRun
from tests.generator.test_train import INFO, config, data
from tests.support.s3_server import Instance

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # each restart of all ranks takes seconds

MODEL = GeneratorConfig(width=32, layers=2, heads=2, ffn_width=48, dropout=0.1)
STEPS, EVERY = 12, 3
DISTURBED_AT = (4, 8)  # steps, each after a checkpoint
WAYS = ("ddp", "fsdp")


class Stopped(Exception):
    """The driver gave up."""


class Training(NamedTuple):
    """A training by ranks, the first of which disturbs it when it has done some steps."""

    store: Store
    notes: Path
    way: str
    disturb: Callable[[int, "Training"], None] | None = None
    environment: Mapping[str, str] = {}

    def run(self, ranks: int, progress: Progress = silent) -> None:
        self.notes.mkdir(exist_ok=True)
        run_ranks(self.in_rank, ranks, progress=progress)

    def in_rank(self, ranks: Ranks, progress: Progress) -> None:
        os.environ.update(self.environment)
        (self.notes / f"{ranks.rank}").write_text(str(os.getpid()))
        values = {"checkpoint_every": EVERY, "keep_checkpoints": 2, "validate_every": 6, "parallel": self.way}

        def disturbed(done: int, total: int, figures: Mapping[str, float]) -> None:
            progress(done, total, figures)
            mark = self.notes / f"disturbed-{done}"
            if self.disturb is not None and done in DISTURBED_AT and not mark.exists():
                mark.touch()
                self.disturb(done, self)

        report = disturbed if ranks.is_first else silent
        run = TrainingRun(self.store, seed=0, ranks=ranks, progress=report)
        train_generator(data(), data(40, seed=1), INFO, MODEL, config(STEPS, micro_batch=4, **values), run=run)

    def pid(self, rank: int) -> int:
        return int((self.notes / f"{rank}").read_text())

    def weights(self) -> dict[str, torch.Tensor]:
        return load(self.store.read("model.safetensors"))


def kill(done: int, training: Training) -> None:
    """Kill a rank, the other one the second time."""
    os.kill(training.pid(1 if done == DISTURBED_AT[0] else 0), signal.SIGKILL)


def hang(done: int, training: Training) -> None:
    """Stop a rank's process, once: it keeps its connections and does nothing."""
    if done == DISTURBED_AT[0]:
        os.kill(training.pid(1), signal.SIGSTOP)


class PausedServer(NamedTuple):
    """Disturbance: a server that does not answer for a while."""

    pid: int
    seconds: float

    def __call__(self, done: int, _: Training) -> None:
        if done == DISTURBED_AT[0]:
            os.kill(self.pid, signal.SIGSTOP)
            threading.Timer(self.seconds, os.kill, [self.pid, signal.SIGCONT]).start()


@pytest.fixture(scope="module")
def _ray() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, session(num_cpus=4):
        patch.setenv("SFTOK_RANK_PATIENCE", "5")
        yield


@pytest.fixture(scope="module")
def undisturbed(_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], dict[str, torch.Tensor]]:
    """Weights of trainings that were left alone, by way and number of ranks."""
    made: dict[tuple[str, int], dict[str, torch.Tensor]] = {}

    def weights(way: str, ranks: int) -> dict[str, torch.Tensor]:
        if (way, ranks) not in made:
            folder = tmp_path_factory.mktemp(f"{way}-{ranks}")
            training = Training(Store(folder / "store"), folder / "notes", way)
            training.run(ranks)
            made[way, ranks] = training.weights()
        return made[way, ranks]

    return weights


Weights = Callable[[str, int], dict[str, torch.Tensor]]


@pytest.mark.parametrize("disturb", [kill, hang])
@pytest.mark.parametrize(
    ("way", "ranks"),
    [
        pytest.param(way, ranks, marks=[pytest.mark.slow] * ((way, ranks) != ("ddp", 2)))
        for way in WAYS
        for ranks in (2, 4)
    ],
)
def test_a_lost_rank_changes_nothing(
    way: str, ranks: int, disturb: Callable[[int, Training], None], undisturbed: Weights, tmp_path: Path
) -> None:
    training = Training(Store(tmp_path / "store"), tmp_path / "notes", way, disturb)
    training.run(ranks)
    found, wanted = training.weights(), undisturbed(way, ranks)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert all((training.notes / f"disturbed-{done}").exists() for done in DISTURBED_AT)
    assert not any(stopped(training.pid(rank)) for rank in range(ranks))


def stopped(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() == psutil.STATUS_STOPPED


@pytest.mark.parametrize("way", WAYS)
def test_ranks_may_become_fewer_and_more(way: str, undisturbed: Weights, tmp_path: Path) -> None:
    """4 ranks, then 2, then 4 again: each goes on from the other's checkpoint."""
    training = Training(Store(tmp_path / "store"), tmp_path / "notes", way)

    def stop_after(steps: int, done: int, total: int, figures: Mapping[str, float]) -> None:
        del total, figures
        if done >= steps:
            raise Stopped

    for ranks, steps in ((4, 4), (2, 8)):
        with pytest.raises(Stopped):
            training.run(ranks, partial(stop_after, steps))
        assert training.store.list("checkpoints")
    training.run(4)
    found, wanted = training.weights(), undisturbed(way, 4)
    assert max((found[name] - wanted[name]).abs().max().item() for name in wanted) < 2e-3  # rounding, 12 steps on


def test_a_store_that_is_away_for_20_seconds_costs_nothing(undisturbed: Weights, tmp_path: Path) -> None:
    home = tmp_path / "s3"
    home.mkdir()
    instance = Instance(home)
    assert instance.start()
    try:
        assert instance.process is not None
        environment = instance.server.environment
        pause = PausedServer(instance.process.pid, 20)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            store = Store("s3://tests/survival")
            training = Training(store, tmp_path / "notes", "ddp", pause, environment)
            began = time.monotonic()
            training.run(2)
            assert time.monotonic() - began > 20
            found, wanted = training.weights(), undisturbed("ddp", 2)
            assert all(torch.equal(found[name], wanted[name]) for name in wanted)
            assert len([key for key in store.list("checkpoints") if key.endswith("checkpoint.json")]) == 2
    finally:
        instance.stop()
