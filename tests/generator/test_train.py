"""Generator training: it learns what is to be learnt, keeps the best, resumes bit for bit."""

import contextlib
import json

import numpy as np
import pytest
import torch

from generator.artifacts import load_generator
from generator.config import AnnealedOrder, GeneratorConfig, GeneratorTrainingConfig, MaskedConfig, SampleConfig
from generator.data import CodeData, TrainCodes, space_of
from generator.generate import SampleJob, generate
from generator.train import negative_log_likelihood, train_generator
from infra.codes import CodeRows, CodesInfo, read_codes
from infra.schedule import OptimizerConfig
from infra.store import Store
from infra.training import Run, TrainResult
from infra.workers import WorkerOptions

MODEL = GeneratorConfig(width=32, layers=1, heads=2, ffn_width=48, dropout=0.0)
INFO = CodesInfo(
    tokenizer="t",
    codebook_size=16,
    num_tokens=4,
    image_size=8,
    assignment="nearest",
    precision="fp32",
    class_names=("a", "b"),
)


def data(count: int = 64, *, seed: int = 0) -> CodeData:
    """The first code tells the class, the second is random, the others follow from the second."""
    random = np.random.default_rng(seed)
    classes, second = np.arange(count, dtype=np.int32) % 2, random.integers(8, size=count)
    codes = np.stack([classes * 5, second, second + 8, (second * 3) % 16], axis=1).astype(np.uint16)
    return CodeData.of(CodeRows([f"{i}" for i in range(count)], classes, ["center"] * count, codes))


def config(steps: int, **changes: object) -> GeneratorTrainingConfig:
    optimizer = OptimizerConfig(lr=1e-2, end_lr=1e-3, warmup_steps=5, ema_decay=0.9)
    values = {"steps": steps, "batch_size": 16, "optimizer": optimizer, "log_every": 1, **changes}
    return GeneratorTrainingConfig.model_validate(values)


def train(folder: Store, training: GeneratorTrainingConfig, run: Run | None = None) -> TrainResult:
    return train_generator(data(), data(seed=1), INFO, MODEL, training, run=run or Run(folder, seed=0))


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
        train(parts, config(4, **settings), Run(parts, seed=0, progress=stop))
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
    train_generator(few, data(seed=1), INFO, MODEL, config(80, validate_every=5, keep="best"), run=Run(store, seed=0))
    lines = [json.loads(line) for line in store.read("log.jsonl").decode().splitlines()]
    nlls = [line["val_nll"] for line in lines if "val_nll" in line]
    assert min(nlls) < nlls[-1]  # eight rows are learnt by heart
    network, _ = load_generator(store)
    assert negative_log_likelihood(network, data(seed=1), Run(store, 0)) == pytest.approx(min(nlls), rel=1e-5)


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


def test_unlabelled_rows_train_the_null_class() -> None:
    rows = data(8)
    unlabelled = CodeData(torch.full_like(rows.classes, -1), rows.codes)
    stream = TrainCodes(unlabelled, space_of(INFO), seed=0, batch_size=8, class_dropout=0.0)
    assert (stream.batch(0).classes == 2).all()


def test_a_masked_generator_learns_and_samples_too(store: Store) -> None:
    """The first code tells the class: a generator that has learnt anything gets it right for every sample."""
    model = MaskedConfig(width=32, layers=2, heads=2, ffn_width=64, dropout=0.0)
    made = store.at("masked")
    result = train_generator(data(), data(seed=1), INFO, model, config(150), run=Run(made, seed=0))
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

            run = Run(store.at(name), seed=0, progress=stop)
            with contextlib.suppress(KeyboardInterrupt):
                train_generator(data(), data(seed=1), INFO, model, config(4, checkpoint_every=2), run=run)
        runs[name] = store.at(name).read("model.safetensors")
    assert runs["whole"] == runs["parts"]
