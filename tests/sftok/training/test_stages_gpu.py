"""Training of the tokenizer on CUDA: it resumes, repeats itself, does not wait, and passes what overflows."""

import contextlib
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from infra.compute.device import IEEE, NumericsConfig, use_numerics
from infra.compute.memory import reraise_out_of_memory
from infra.store.store import Store
from infra.training.learner import Learner
from infra.training.loop import TrainingRun, TrainResult
from sftok.losses.dino import shrink
from tests.sftok.training.test_stages import STAGES, figures, losses, run_align
from tests.support import ROOT

DETERMINISTIC = NumericsConfig(deterministic=True)
FILES = ("model.safetensors", "log.jsonl")
Stage = Callable[..., TrainResult]
every_stage = pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)


class Killed(Exception):
    pass


def stop(done: int, total: int, figures: object) -> None:
    if done == 3:
        raise Killed


@pytest.fixture(autouse=True)
def _numerics_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before cuBLAS is first used, if this is the first test
    yield
    if torch.cuda.is_available():
        use_numerics(IEEE, "cuda")


def on_cuda(folder: Store, **changes: object) -> TrainingRun:
    return TrainingRun(folder, seed=0, device="cuda", numerics=DETERMINISTIC, **changes)  # type: ignore[arg-type]


@pytest.mark.gpu
@every_stage
def test_two_and_two_steps_equal_four(stage: Stage, store: Store) -> None:
    whole, parts = store.at("whole"), store.at("parts")
    stage(on_cuda(whole), 4)
    with pytest.raises(Killed):
        stage(on_cuda(parts, progress=stop), 4, checkpoint_every=2)
    stage(on_cuda(parts), 4, checkpoint_every=2)
    for name in FILES:
        assert parts.read(name) == whole.read(name), name


@pytest.mark.gpu
@every_stage
def test_twenty_steps_repeat_themselves_bit_by_bit(stage: Stage, store: Store) -> None:
    for name in ("once", "again"):
        stage(on_cuda(store.at(name)), 20, micro_batch=6, precision="bf16")
    for name in FILES:
        assert store.at("once").read(name) == store.at("again").read(name), name


def test_twenty_steps_repeat_themselves_on_a_cpu_too(store: Store) -> None:
    for name in ("once", "again"):
        run = TrainingRun(store.at(name), seed=0, numerics=DETERMINISTIC)
        STAGES["fine_tune_game"](run, 20, micro_batch=6)
    for name in FILES:
        assert store.at("once").read(name) == store.at("again").read(name), name


@pytest.mark.gpu
@pytest.mark.parametrize("first", ["cpu", "cuda"])
@every_stage
def test_a_checkpoint_of_another_device_is_gone_on_from(stage: Stage, first: str, store: Store) -> None:
    """Two steps there and two here: but for rounding, which may decide some codes, what four steps here give."""
    then = {"cpu": "cuda", "cuda": "cpu"}[first]
    with pytest.raises(Killed):
        stage(TrainingRun(store.at("parts"), seed=0, device=first, progress=stop), 4, checkpoint_every=2)
    stage(TrainingRun(store.at("parts"), seed=0, device=then), 4, checkpoint_every=2)
    stage(TrainingRun(store.at("whole"), seed=0, device=then), 4)
    assert losses(store.at("parts")) == pytest.approx(losses(store.at("whole")), rel=0.05)


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_a_killed_process_is_gone_on_from(device: str, store: Store) -> None:
    """`kill -9`, and the same command again: on CUDA this ended in an error, and did so for ever."""
    assert isinstance(store.path, Path)
    whole, parts = store.path / "whole", store.path / "parts"
    assert process(whole, device, kill_at=0) == 0
    assert process(parts, device, kill_at=3) == -signal.SIGKILL
    assert not (parts / "model.safetensors").exists()
    assert process(parts, device, kill_at=0) == 0
    for name in FILES:
        assert (parts / name).read_bytes() == (whole / name).read_bytes(), name


def process(folder: Path, device: str, *, kill_at: int) -> int:
    """Train in a process of its own, which kills itself at a step; how it ended."""
    command = [sys.executable, "-m", "tests.sftok.training.test_stages_gpu", str(folder), device, str(kill_at)]
    return subprocess.run(command, cwd=ROOT, timeout=280, check=False).returncode


def main(folder: str, device: str, kill_at: str) -> None:
    """What `process` runs."""

    def listen(done: int, total: int, figures: object) -> None:
        if done == int(kill_at):
            os.kill(os.getpid(), signal.SIGKILL)

    run = TrainingRun(Store(folder), seed=0, device=device, numerics=DETERMINISTIC, progress=listen)
    STAGES["warm_up"](run, 4, checkpoint_every=2)


@contextlib.contextmanager
def waiting_refused() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is a prototype, it says
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@every_stage
def test_no_step_between_two_logged_lines_waits_for_the_gpu(
    stage: Stage, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the update of step 7 to that of step 10, when no restart of the teacher's codes is due."""
    refused = contextlib.ExitStack()
    updates: list[int] = []
    update = Learner.update

    def watched(self: Learner, step: int) -> dict[str, Tensor | float]:
        made = update(self, step)
        updates.append(step)
        if step == 7 and updates.count(7) == 1:
            refused.enter_context(waiting_refused())
        if step == 10:
            refused.close()
        return made

    monkeypatch.setattr(Learner, "update", watched)
    with refused:
        stage(TrainingRun(store, seed=0, device="cuda"), 14, micro_batch=6, log_every=1000)
    assert 10 in updates


@pytest.mark.gpu
@pytest.mark.parametrize("stage", ["warm_up", "align", "fine_tune", "fine_tune_game"])
def test_half_precision_trains_and_counts_what_it_left_out(stage: str, store: Store) -> None:
    STAGES[stage](TrainingRun(store, seed=0, device="cuda"), 40, precision="fp16")
    skipped = figures(store, "skipped_steps")
    assert skipped == sorted(skipped)
    assert skipped[-1] < 30
    name = "mse" if "fine" in stage else "cross_entropy"
    assert figures(store, name)[-1] < figures(store, name)[0]


@pytest.mark.gpu
def test_a_compiled_stage_learns_the_same_and_compiles_in_its_first_step_alone(store: Store) -> None:
    from torch._dynamo.utils import counters

    graphs = []

    def note(done: int, total: int, figures: object) -> None:
        graphs.append(counters["stats"]["unique_graphs"])

    sizes = {"batch_size": 18, "micro_batch": 9, "validate_every": 2}
    run_align(TrainingRun(store.at("eager"), seed=0, device="cuda"), 4, **sizes)
    run_align(TrainingRun(store.at("compiled"), seed=0, device="cuda", progress=note), 4, compile=True, **sizes)
    assert losses(store.at("compiled")) == pytest.approx(losses(store.at("eager")), rel=0.02)
    assert graphs == [graphs[0]] * 4


@pytest.mark.gpu
def test_images_are_shrunk_for_the_discriminator_as_on_a_cpu() -> None:
    images = torch.rand(2, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(shrink(images.cuda()).cpu(), shrink(images), atol=1e-5)


@pytest.mark.gpu
def test_a_full_card_is_told_in_a_line() -> None:
    with pytest.raises(ValueError, match=r"memory ran out .*; take less"), reraise_out_of_memory("take less"):
        torch.empty(1 << 50, dtype=torch.uint8, device="cuda")


@pytest.mark.gpu
def test_every_stage_states_its_rate_and_share(store: Store) -> None:
    from infra.training.speed import peak_flops

    metrics = run_align(TrainingRun(store, seed=0, device="cuda"), 6).metrics
    assert metrics["images_per_s"] > 0
    assert ("mfu" in metrics) == (peak_flops("cuda", "fp32") is not None)


if __name__ == "__main__":
    main(*sys.argv[1:])
