"""The learner and the loop: rates, EMA, gradient accumulation, loss scaling, bad steps, best weights, outputs."""

import hashlib
import io
import json
import math
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from infra.progress import Progress, silent
from infra.store.store import Store
from infra.training.best import BestWeights
from infra.training.config import LoopConfig, OptimizerConfig, TrainingConfig
from infra.training.learner import Learner, OptimizerPlan
from infra.training.loop import TrainingRun, Validation, autocast, over_micro_batches, picture_grid, train_loop
from infra.training.marker import MARKER, file_name, read_marker
from infra.training.non_finite import SKIPPED_IN_A_ROW
from infra.training.schedule import learning_rate

OPTIMIZER = OptimizerConfig(lr=0.1, end_lr=0.01, warmup_steps=4, ema_decay=0.5)


def linear() -> nn.Linear:
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(6.0).view(2, 3) / 6)
        layer.bias.zero_()
    return layer


def learner(layer: nn.Module, **changes: object) -> Learner:
    return Learner(layer, OptimizerPlan(OPTIMIZER, 20, **changes))  # type: ignore[arg-type]


def test_the_rate_rises_linearly_then_falls_by_half_a_cosine() -> None:
    rates = [learning_rate(OPTIMIZER, step, 20) for step in range(21)]
    assert rates[:5] == pytest.approx([0, 0.025, 0.05, 0.075, 0.1])
    assert rates[12] == pytest.approx(0.01 + 0.09 / 2)  # half way between warm-up and end
    assert rates[20] == pytest.approx(0.01)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_the_average_follows_the_published_rule() -> None:
    """The first update copies; then min((1 + s) / (10 + s), bound), with s the updates before."""
    layer = linear()
    made = learner(layer)
    average = None
    for step in range(3):
        made.backward(layer(torch.ones(1, 3)).square().mean())
        made.update(step)
        decay = 0 if step == 0 else min((1 + step) / (10 + step), 0.5)
        now = layer.weight.detach()
        average = now.clone() if average is None else decay * average + (1 - decay) * now
        assert torch.allclose(made.ema["weight"], average, atol=1e-6)


def test_gradients_of_micro_batches_are_those_of_the_batch() -> None:
    inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    results = []
    for parts in (1, 4):
        layer = linear()
        made = learner(layer, micro_batches=parts)
        for rows in inputs.split(8 // parts):
            made.backward(layer(rows).square().mean())
        figures = made.update(0)
        results.append((float(figures["grad_norm"]), layer.weight.detach().clone()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert torch.allclose(results[0][1], results[1][1], atol=1e-6)


def loop(
    folder: Store,
    step: Callable[[int], Mapping[str, Tensor | float]],
    made: Learner,
    config: LoopConfig,
    best: BestWeights | None = None,
) -> None:
    picture = picture_grid([torch.rand(4, 3, 8, 8), torch.rand(4, 3, 8, 8)])

    def validate(done: int) -> Validation:
        return Validation({"val_loss": abs(done - 4)}, {"grid": picture})

    train_loop({"model": made}, step, config, run=TrainingRun(folder, seed=0), validate=validate, best=best)


def stepper(layer: nn.Module, made: Learner, poison: int | None = None) -> Callable[[int], dict[str, Tensor | float]]:
    def step(step: int) -> dict[str, Tensor | float]:
        loss = layer(torch.ones(1, 3)).square().mean()
        if step == poison:
            loss = loss * math.nan
        made.backward(loss)
        return {"loss": loss.item(), **made.update(step)}

    return step


def test_a_loss_that_is_not_finite_stops_and_names_the_step(store: Store) -> None:
    layer = linear()
    made = learner(layer)
    with pytest.raises(FloatingPointError, match="step 2: the loss is nan; lower the learning rate"):
        loop(store, stepper(layer, made, poison=2), made, LoopConfig(steps=5))
    assert torch.isfinite(layer.weight).all()
    assert not store.exists("log.jsonl")


def overflow(layer: nn.Module) -> Tensor:
    """Return a finite loss with an infinite gradient."""
    return (layer(torch.ones(1, 3)) * 0).sqrt().sum()


def check(made: Learner, step: int = 0) -> None:
    made.faults.check(step, made.faults.status.tolist())


def test_a_gradient_that_is_not_finite_stops_too_and_has_changed_nothing() -> None:
    layer = linear()
    made = learner(layer)
    made.backward(layer(torch.ones(1, 3)).square().mean())
    made.update(0)
    before = [tensor.clone() for tensor in (layer.weight, *made.optimizer.state[layer.weight].values())]
    made.backward(overflow(layer))
    made.update(1)
    for tensor, then in zip((layer.weight, *made.optimizer.state[layer.weight].values()), before, strict=True):
        assert torch.equal(tensor, then)
    with pytest.raises(FloatingPointError, match=r"step 1: the gradient norm is (inf|nan)"):
        check(made)


@pytest.mark.parametrize("poison", [2, 3, 5])
def test_the_first_bad_step_is_named_though_it_is_found_out_later(poison: int, store: Store) -> None:
    """Figures are fetched at steps 1 and 6 here; nothing after the bad step is saved or published."""
    layer = linear()
    made = learner(layer)
    config = LoopConfig(steps=9, log_every=6, checkpoint_every=6)
    steps = []

    def step(at: int) -> dict[str, Tensor | float]:
        steps.append(at)
        loss = layer(torch.ones(1, 3)).square().mean() * (math.nan if at == poison else 1)
        made.backward(loss)
        return {"loss": loss, **made.update(at)}

    with pytest.raises(FloatingPointError, match=f"step {poison}: the loss is nan; lower the learning rate"):
        loop(store, step, made, config)
    assert steps[-1] == 5
    assert torch.isfinite(layer.weight).all()
    assert not store.list("checkpoints")
    assert not store.exists("log.jsonl")


def test_half_precision_passes_a_loss_that_is_not_finite_and_counts_it() -> None:
    layer = linear()
    made = learner(layer, is_scaled=True, micro_batches=2)
    figures = []
    for step, factor in enumerate((1.0, math.inf, 1.0)):
        before = layer.weight.detach().clone()
        made.backward(layer(torch.ones(1, 3)).square().mean())
        made.backward(layer(torch.ones(1, 3)).square().mean() * factor)
        figures.append(made.update(step))
        assert torch.equal(layer.weight, before) == math.isinf(factor)
        check(made, step)
    assert [float(seen["skipped_steps"]) for seen in figures] == [0, 1, 1]
    other = learner(linear(), is_scaled=True)
    other.load(made.tensors())
    assert float(other.faults.figures["skipped_steps"]) == 1


def test_half_precision_stops_where_nothing_but_overflows_comes() -> None:
    layer = linear()
    made = learner(layer, may_skip=True)
    for step in range(SKIPPED_IN_A_ROW):
        check(made, step)
        made.backward(overflow(layer))
        made.update(step)
    with pytest.raises(FloatingPointError, match=rf"step 39: .* in the last {SKIPPED_IN_A_ROW} steps, all skipped"):
        check(made, 39)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "MemoryError"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), "CUDA out of memory. Tried"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "can't allocate memory: you tried"),
        (torch.AcceleratorError("CUDA error: out of memory"), "CUDA error: out of memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "ALLOC_FAILED"),
    ],
)
def test_memory_that_runs_out_is_told_with_the_setting_to_lower(error: Exception, said: str, store: Store) -> None:
    made = learner(linear())

    def step(_: int) -> dict[str, Tensor | float]:
        raise error

    config = TrainingConfig(steps=2, batch_size=128, optimizer=OPTIMIZER)
    with pytest.raises(ValueError, match=re.escape(said)) as found:
        loop(store, step, made, config)
    assert "training.micro_batch = 0 (the whole batch of 128): set it to fewer rows than 128" in str(found.value)
    assert "\n" not in str(found.value)


def test_other_errors_of_a_step_stay_what_they_are(store: Store) -> None:
    def step(_: int) -> dict[str, Tensor | float]:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        loop(store, step, learner(linear()), LoopConfig(steps=2))


class NoReading(TorchDispatchMode):
    """Mode that rejects synchronizing the host with a GPU; only integers may be read, such as orders of images."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        assert func not in (aten.nonzero.default, aten.bincount.default), func
        assert func != aten._local_scalar_dense.default or not args[0].is_floating_point(), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("is_scaled", [False, True])
def test_a_step_reads_nothing_back(is_scaled: bool) -> None:
    layer = linear()
    made, run = learner(layer, is_scaled=is_scaled, micro_batches=2), TrainingRun(Store("."), seed=0)

    def part(_: int) -> dict[str, Tensor]:
        loss = layer(torch.ones(1, 3)).square().mean()
        made.backward(loss)
        return {"loss": loss}

    with NoReading():
        figures: dict[str, Tensor | float] = {}
        for step in range(3):
            figures = {**over_micro_batches(part, step, 2, run=run), **made.update(step)}
        with pytest.raises(AssertionError, match="local_scalar"):
            float(figures["loss"])


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_a_checkpoint_holds_is_put_where_its_parameter_lies(device: str) -> None:
    """Guards against a `step` tensor left on the CPU, which a fused step rejects: GPU runs could not resume."""
    first = learner(conv := nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last))
    first.backward(conv(torch.ones(1, 3, 4, 4)).square().mean())
    first.update(0)
    made = learner(nn.Conv2d(3, 4, 3, device=device).to(memory_format=torch.channels_last))
    best = BestWeights(made, "val_loss", higher=False)
    made.load(first.tensors())
    best.load(BestWeights(first, "val_loss", higher=False).tensors())
    for name, parameter in made.parameters.items():
        beside = [made.ema[name], best.weights[name], *made.optimizer.state[parameter].values()]
        assert len(beside) == 5
        assert {tensor.device for tensor in beside} == {parameter.device}
        assert {t.stride() for t in beside if t.ndim} == {parameter.stride()}


def test_a_restored_optimizer_goes_on_as_the_first() -> None:
    whole, parts = linear(), linear()
    first, second = learner(whole), learner(linear())
    for step in range(4):
        first.backward(whole(torch.ones(1, 3)).square().mean())
        first.update(step)
        if step == 1:
            second = learner(parts)
            second.load(first.tensors())
        if step >= 2:
            second.backward(parts(torch.ones(1, 3)).square().mean())
            second.update(step)
    for name, tensor in first.tensors().items():
        assert torch.equal(tensor, second.tensors()[name]), name


def test_a_training_goes_on_from_a_checkpoint_of_an_older_version(store: Store) -> None:
    """It lacks the moments of an optimizer that had not begun, such as a discriminator's."""

    def train(folder: Store, progress: Progress = silent) -> dict[str, Tensor]:
        first, second = linear(), linear()
        early, late = learner(first), learner(second, start=3)

        def step(at: int) -> dict[str, Tensor | float]:
            if at >= 3:
                stepper(second, late)(at)
            return stepper(first, early)(at)

        config = LoopConfig(steps=6, checkpoint_every=2, log_every=1)
        run = TrainingRun(folder, seed=0, progress=progress)
        train_loop({"early": early, "late": late}, step, config, run=run, validate=lambda _: Validation({}, {}))
        made = {"early": early, "late": late}
        return {f"{name}/{key}": t.clone() for name, part in made.items() for key, t in part.tensors().items()}

    def stop(done: int, total: int, figures: object) -> None:
        if done == 3:
            raise KeyError

    whole, folder = train(store.at("whole")), store.at("parts", "checkpoints", "step-000000002")
    with pytest.raises(KeyError):
        train(store.at("parts"), stop)
    marker = read_marker(folder)
    (file,) = marker.files
    begun = ("late/exp_avg", "late/step")
    data = save({name: t for name, t in load(folder.read(file)).items() if not name.startswith(begun)})
    folder.delete_tree()
    old = {"step": 2, "file": file_name(hashlib.sha256(data).hexdigest()), "sha256": hashlib.sha256(data).hexdigest()}
    folder.write(str(old["file"]), data)
    folder.write(MARKER, json.dumps({**old, "state": marker.state}, indent=1).encode())
    done: list[int] = []
    parts = train(store.at("parts"), lambda step, total, figures: done.append(step))
    assert done == [3, 4, 5, 6]
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())
    assert store.read("parts/log.jsonl") == store.read("whole/log.jsonl")


def test_a_store_that_does_not_answer_stops_no_step(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the checkpoint nor the log and events beside it; the next checkpoint waits for them."""
    layer, go, write = linear(), threading.Event(), Store.write
    made, seen = learner(layer), dict[int, list[str]]()

    def late(self: Store, key: str, data: bytes) -> None:
        assert go.wait(20)
        write(self, key, data)

    def progress(done: int, total: int, figures: object) -> None:
        seen[done] = [name for name in store.list() if name.endswith(("checkpoint.json", "log.jsonl", ".sftok"))]
        if done == 3:
            go.set()

    monkeypatch.setattr(Store, "write", late)
    config = LoopConfig(steps=5, checkpoint_every=2, log_every=1)
    run = TrainingRun(store, seed=0, progress=progress)
    train_loop({"model": made}, stepper(layer, made), config, run=run, validate=lambda _: Validation({}, {}))
    assert seen[3] == []
    assert {"log.jsonl", "events/events.out.tfevents.0000000002.sftok"} < set(seen[5])
    assert f"checkpoints/step-{4:09d}/checkpoint.json" in store.list()


def test_half_precision_leaves_an_overflow_out_and_lowers_the_scale() -> None:
    layer = linear()
    made = learner(layer, is_scaled=True)
    made.backward(layer(torch.ones(1, 3)).square().mean())
    made.update(0)
    before, scale = layer.weight.detach().clone(), made.scaler.get_scale()
    made.backward(overflow(layer))
    made.update(1)
    assert torch.equal(layer.weight, before)
    assert made.scaler.get_scale() == scale / 2
    other = learner(linear(), is_scaled=True)
    other.load(made.tensors())
    other.backward(torch.zeros((), requires_grad=True) * 1)
    assert other.scaler.get_scale() == scale / 2


def test_fp16_trains_on_the_cpu_too() -> None:
    layer = linear()
    config = TrainingConfig(steps=12, batch_size=4, optimizer=OPTIMIZER, precision="fp16")
    made = Learner(layer, OptimizerPlan.of(config, TrainingRun(Store("."), 0).ranks))
    losses = []
    for step in range(12):  # the first ones overflow until the scale has come down
        with autocast("fp16", "cpu"):
            loss = layer(torch.ones(4, 3)).float().square().mean()
        made.backward(loss)
        made.update(step)
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_the_best_average_is_what_is_left(store: Store) -> None:
    layer = linear()
    made = learner(layer)
    best = BestWeights(made, "val_loss", higher=False)
    seen: dict[int, Tensor] = {}

    def step(at: int) -> dict[str, Tensor | float]:
        figures = stepper(layer, made)(at)
        seen[at + 1] = made.ema["weight"].clone()
        return figures

    loop(store, step, made, LoopConfig(steps=6, validate_every=1), best)
    assert best.best == 0  # |done - 4| is least at 4
    assert torch.equal(made.ema["weight"], seen[4])


def test_as_many_checkpoints_stay_as_are_kept_and_pictures_and_events_are_written(store: Store) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    layer = linear()
    made = learner(layer)
    config = LoopConfig(steps=10, checkpoint_every=2, keep_checkpoints=3, log_every=1, validate_every=5)
    loop(store, stepper(layer, made), made, config)
    marked = [name for name in store.list("checkpoints") if name.endswith("checkpoint.json")]
    assert [int(name.split("-")[1].split("/")[0]) for name in marked] == [4, 6, 8]
    assert Image.open(io.BytesIO(store.read("grid.png"))).size == (32, 16)
    assert store.list("pictures") == ["pictures/grid-000000005.png", "pictures/grid-000000010.png"]

    assert isinstance(store.path, Path)
    events = EventAccumulator(str(store.path / "events")).Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 11))
    assert {"val_loss", "lr", "grad_norm"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Images("grid")] == [5, 10]


def test_figures_are_means_over_the_micro_batches() -> None:
    seeds = []

    def part(part: int) -> dict[str, Tensor]:
        seeds.append(torch.rand(()).item())
        return {"loss": torch.tensor(float(part))}

    run = TrainingRun(Store("."), seed=0)
    assert over_micro_batches(part, 3, 4, run=run) == {"loss": torch.tensor(1.5, dtype=torch.float64)}
    assert len(set(seeds)) == 4
    again = list(seeds)
    over_micro_batches(part, 3, 4, run=run)
    assert seeds[4:] == again  # torch's own randomness is a function of seed, step and part
