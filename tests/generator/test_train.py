"""Generator training learns, keeps the best weights, and resumes bit for bit."""

import contextlib
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

import generator.data
from generator.artifacts import load_generator
from generator.code_space import CodeSpace
from generator.config import AnnealedOrder, GeneratorConfig, GeneratorTrainingConfig, MaskedConfig, SampleConfig
from generator.data import CodeData, TrainCodes, space_of
from generator.flops import training_flops
from generator.kinds import build_generator
from generator.objectives import random_mask
from generator.samples import SampleJob, generate
from generator.train import VALIDATION_BATCH, held_out_figures, train_generator
from infra.codes.contract import CodeRows, read_codes
from infra.compute.workers import WorkerOptions
from infra.store.store import Store
from infra.training.config import OptimizerConfig
from infra.training.loop import TrainingRun, TrainResult, generator_of
from tests.support.codes_info import codes_info
from tests.support.small_generators import spread

MODEL = GeneratorConfig(width=32, layers=1, heads=2, ffn_width=48, dropout=0.0)
MASKED = MaskedConfig(width=32, layers=1, heads=2, ffn_width=48, dropout=0.0)
INFO = codes_info(16, 4)


def data(count: int = 64, *, seed: int = 0) -> CodeData:
    """Make rows whose first code is the class, the second random, and the others functions of the second."""
    random = np.random.default_rng(seed)
    classes, second = np.arange(count, dtype=np.int32) % 2, random.integers(8, size=count)
    codes = np.stack([classes * 5, second, second + 8, (second * 3) % 16], axis=1).astype(np.uint16)
    return CodeData.of(CodeRows([f"{i}" for i in range(count)], classes, ["center"] * count, codes))


def config(steps: int, **changes: object) -> GeneratorTrainingConfig:
    optimizer = OptimizerConfig(lr=1e-2, end_lr=1e-3, warmup_steps=5, ema_decay=0.9)
    values = {"steps": steps, "batch_size": 16, "optimizer": optimizer, "log_every": 1, **changes}
    return GeneratorTrainingConfig.model_validate(values)


def train(folder: Store, training: GeneratorTrainingConfig, run: TrainingRun | None = None) -> TrainResult:
    return train_generator(data(), data(seed=1), INFO, MODEL, training, run=run or TrainingRun(folder, seed=0))


def test_it_reaches_the_entropy_of_the_data(store: Store) -> None:
    result = train(store, config(150, class_dropout=0.0))
    # Of four codes one is random, uniform over eight: ln(8) / 4 nats a code.
    assert result.metrics["val_nll"] == pytest.approx(np.log(8) / 4, abs=0.08)


def test_two_and_two_steps_equal_four(store: Store) -> None:
    class Killed(Exception):
        pass

    def stop(done: int, total: int, figures: object) -> None:
        if done == 3:
            raise Killed

    settings = {"checkpoint_every": 2, "validate_every": 1, "keep": "best"}
    whole, parts = store.at("whole"), store.at("parts")
    train(whole, config(4, **settings))
    with pytest.raises(Killed):
        train(parts, config(4, **settings), TrainingRun(parts, seed=0, progress=stop))
    train(parts, config(4, **settings))
    assert parts.read("model.safetensors") == whole.read("model.safetensors")
    assert parts.read("log.jsonl") == whole.read("log.jsonl")


def test_micro_batches_add_up_to_the_batch(store: Store) -> None:
    whole, parts = store.at("whole"), store.at("parts")
    train(whole, config(6))
    train(parts, config(6, micro_batch=4))

    def losses(folder: Store) -> list[float]:
        return [json.loads(line)["loss"] for line in folder.read("log.jsonl").decode().splitlines()]

    assert losses(parts) == pytest.approx(losses(whole), rel=1e-4)
    assert losses(parts) != losses(whole)  # rounding: the parts are there


def test_the_best_weights_are_those_that_are_published(store: Store) -> None:
    few = data(8)
    train_generator(
        few, data(seed=1), INFO, MODEL, config(80, validate_every=5, keep="best"), run=TrainingRun(store, seed=0)
    )
    lines = [json.loads(line) for line in store.read("log.jsonl").decode().splitlines()]
    nlls = [line["val_nll"] for line in lines if "val_nll" in line]
    assert min(nlls) < nlls[-1]  # eight rows are learnt by heart
    network, _ = load_generator(store)
    assert held_out_figures(network, data(seed=1), TrainingRun(store, 0))["val_nll"] == pytest.approx(
        min(nlls), rel=1e-5
    )


@pytest.mark.parametrize("kind", ["autoregressive", "masked"])
def test_held_out_figures_are_those_of_a_plain_loop(kind: str, store: Store) -> None:
    model = build_generator(MODEL if kind == "autoregressive" else MASKED, space_of(INFO))
    model.initialise()
    spread(model)
    held_out, run = data(300, seed=1), TrainingRun(store, seed=3)  # more than one batch of a validation
    found = held_out_figures(model, held_out, run)
    losses, right, hidden = torch.zeros(4), torch.zeros(4), torch.zeros(4)
    for first in (0, VALIDATION_BATCH):
        classes, codes = held_out.classes[first:][:VALIDATION_BATCH], held_out.codes[first:][:VALIDATION_BATCH].long()
        mask = random_mask(len(codes), 4, generator_of(3, "held_out", first)) | (kind == "autoregressive")
        with torch.no_grad():
            seen = codes.masked_fill(mask, model.mask_id) if kind == "masked" else codes
            logits = model(classes.long(), seen)
        for row, place in mask.nonzero().tolist():
            losses[place] -= logits[row, place].log_softmax(-1)[codes[row, place]]
            right[place] += logits[row, place].argmax() == codes[row, place]
            hidden[place] += 1
    assert found["val_nll"] == pytest.approx((losses.sum() / hidden.sum()).item(), rel=1e-4)
    assert found["val_perplexity"] == pytest.approx(np.exp(found["val_nll"]))
    assert found["val_top1"] == pytest.approx((right.sum() / hidden.sum()).item())
    in_parts = held_out_figures(model, held_out, run, at_once=100)
    assert in_parts == pytest.approx(found, rel=1e-5)
    by_position = [found[f"val_nll/{place}"] for place in range(4)]
    assert by_position == pytest.approx((losses / hidden).tolist(), rel=1e-4)
    assert len(set(by_position)) == 4


def test_the_log_has_every_figure_and_the_artifact_the_last_ones(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = []
    run = TrainingRun(store, seed=0, progress=lambda done, total, figures: shown.append(dict(figures)))
    with caplog.at_level(logging.INFO, logger="infra.training.log"):
        result = train(store, config(20, validate_every=10), run)
    lines = [json.loads(line) for line in store.read("log.jsonl").decode().splitlines()]
    held_out = {"val_nll", "val_perplexity", "val_top1", *(f"val_nll/{place}" for place in range(4))}
    assert [held_out <= set(line) for line in lines].count(True) == 2
    assert all({"loss", "lr", "grad_norm"} <= set(line) for line in lines)
    assert not any("per_s" in name for line in lines for name in line)  # the log is the same bytes whenever it is made
    last = lines[-1]
    assert {name: result.metrics[name] for name in held_out | {"grad_norm"}} == {
        name: last[name] for name in held_out | {"grad_norm"}
    }
    tokens, flops = result.metrics["tokens_per_s"], result.metrics["model_flops_per_s"]
    assert flops / tokens == pytest.approx(training_flops(MODEL, space_of(INFO)) / 4)
    assert 0 < result.metrics["mfu"] < 1
    assert isinstance(store.path, Path)
    tags = EventAccumulator(str(store.path / "events")).Reload().Tags()["scalars"]
    assert held_out | {"tokens_per_s", "model_flops_per_s", "mfu", "grad_norm"} <= set(tags)
    said = [*shown, *(json.loads(record.message) for record in caplog.records)]
    assert not any("/" in name for figures in said for name in figures)  # a terminal has no room for positions
    assert any("val_top1" in figures for figures in shown)


def test_the_artifact_states_the_figures_of_the_weights_that_it_has(store: Store) -> None:
    few = data(8)
    training = config(80, validate_every=5, keep="best")
    result = train_generator(few, data(seed=1), INFO, MODEL, training, run=TrainingRun(store, seed=0))
    network, _ = load_generator(store)
    found = held_out_figures(network, data(seed=1), TrainingRun(store, 0))
    for name, value in found.items():
        assert result.metrics[name] == pytest.approx(value, rel=1e-5), name


def test_every_row_comes_once_an_epoch_and_labels_are_dropped_as_often_as_asked() -> None:
    rows = data(50)
    numbered = CodeData(rows.classes, torch.arange(50)[:, None].expand(-1, 4))
    stream = TrainCodes(numbered, space_of(INFO), seed=0, batch_size=16, class_dropout=0.25)
    batches = [stream.batch(step) for step in range(200)]
    seen = torch.cat([batch.codes[:, 0] for batch in batches])
    for epoch in range(3200 // 50):
        assert sorted(seen[epoch * 50 : (epoch + 1) * 50].tolist()) == list(range(50))
    dropped = torch.cat([batch.classes for batch in batches]) == 2
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(stream.batch(7).codes, batches[7].codes)  # any step, in any order


def test_rows_that_a_gpu_has_no_room_for_come_from_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = data(50)
    streams = []
    for resident in (generator.data.RESIDENT, 0):
        monkeypatch.setattr(generator.data, "RESIDENT", resident)
        streams.append(TrainCodes(rows, space_of(INFO), seed=0, batch_size=16, class_dropout=0.5, device="cpu"))
    for step in range(5):
        for here, there in zip(*(stream.batch(step) for stream in streams), strict=True):
            assert torch.equal(here, there)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32])
def test_codes_beyond_half_of_their_type_are_what_they_were(dtype: torch.dtype) -> None:
    """Codes are stored as signed integers, which every device can gather."""
    codes = torch.tensor([[0, 1, 40_000, 65_535]] * 4)
    space = CodeSpace(codebook_size=65_536, num_tokens=4, num_classes=2)
    stream = TrainCodes(CodeData(torch.zeros(4), codes.to(dtype)), space, seed=0, batch_size=4, class_dropout=0.0)
    assert torch.equal(stream.batch(0).codes, codes)


def test_unlabelled_rows_train_the_null_class() -> None:
    rows = data(8)
    unlabelled = CodeData(torch.full_like(rows.classes, -1), rows.codes)
    stream = TrainCodes(unlabelled, space_of(INFO), seed=0, batch_size=8, class_dropout=0.0)
    assert (stream.batch(0).classes == 2).all()


def test_a_masked_generator_learns_and_samples_too(store: Store) -> None:
    """The first code is the class: a trained generator gets it right in every sample."""
    model = MaskedConfig(width=32, layers=2, heads=2, ffn_width=64, dropout=0.0)
    made = store.at("masked")
    result = train_generator(data(), data(seed=1), INFO, model, config(150), run=TrainingRun(made, seed=0))
    assert result.metrics["val_nll"] < 0.7 * np.log(16)  # nats; codes at random have ln(16)
    job = SampleJob(made, store.at("samples"), SampleConfig(per_class=20, num_steps=4, temperature=0.5), 0, "g")
    (entry,) = generate(job, options=WorkerOptions())
    _, rows = read_codes(job.out, [entry.path])
    assert (rows.codes[:, 0] == rows.class_id * 5).mean() > 0.9


def test_an_annealed_order_resumes_bit_for_bit(store: Store) -> None:
    model = MODEL.model_copy(update={"order": AnnealedOrder(start_step=1, end_step=3)})
    runs = {}
    for name, steps in (("whole", [None]), ("parts", [3, None])):
        for stop_at in steps:

            def stop(done: int, total: int, figures: object, stop_at: int | None = stop_at) -> None:
                if done == stop_at:
                    raise KeyboardInterrupt

            run = TrainingRun(store.at(name), seed=0, progress=stop)
            with contextlib.suppress(KeyboardInterrupt):
                train_generator(data(), data(seed=1), INFO, model, config(4, checkpoint_every=2), run=run)
        runs[name] = store.at(name).read("model.safetensors")
    assert runs["whole"] == runs["parts"]
