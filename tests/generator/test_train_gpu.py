"""Training of a generator on CUDA resumes, is reproducible, and never synchronizes the host between logged steps."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from generator.config import AnnealedOrder, GeneratorConfig, MaskedConfig
from generator.data import TrainCodes, space_of
from generator.train import train_generator
from infra.compute.device import IEEE, NumericsConfig, use_numerics
from infra.store.store import Store
from infra.training.learner import Learner
from infra.training.loop import TrainingRun
from tests.generator.test_train import INFO, MASKED, MODEL, config, data
from tests.sftok.training.test_stages import losses
from tests.sftok.training.test_stages_gpu import FILES, Killed, stop, waiting_refused

pytestmark = pytest.mark.gpu

ANNEALED = MODEL.model_copy(update={"order": AnnealedOrder(start_step=1, end_step=3), "dropout": 0.1})
MODELS: dict[str, GeneratorConfig | MaskedConfig] = {
    "autoregressive": MODEL.model_copy(update={"dropout": 0.1}),
    "annealed": ANNEALED,
    "masked": MASKED.model_copy(update={"dropout": 0.1}),
}
every_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


@pytest.fixture(autouse=True)
def _numerics_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    yield
    use_numerics(IEEE, "cuda")


def train(
    folder: Store, model: GeneratorConfig | MaskedConfig, steps: int, device: str = "cuda", **changes: object
) -> None:
    progress = {"progress": changes.pop("progress")} if "progress" in changes else {}
    run = TrainingRun(folder, seed=0, device=device, numerics=NumericsConfig(deterministic=True), **progress)  # type: ignore[arg-type]
    train_generator(data(), data(seed=1), INFO, model, config(steps, **changes), run=run)


@every_model
def test_two_and_two_steps_equal_four(model: GeneratorConfig | MaskedConfig, store: Store) -> None:
    settings = {"checkpoint_every": 2, "validate_every": 1, "keep": "best"}
    train(store.at("whole"), model, 4, **settings)
    with pytest.raises(Killed):
        train(store.at("parts"), model, 4, progress=stop, **settings)
    train(store.at("parts"), model, 4, **settings)
    for name in FILES:
        assert store.at("parts").read(name) == store.at("whole").read(name), name


@every_model
def test_twenty_steps_repeat_themselves_bit_by_bit(model: GeneratorConfig | MaskedConfig, store: Store) -> None:
    for name in ("once", "again"):
        train(store.at(name), model, 20, micro_batch=8, precision="bf16")
    for name in FILES:
        assert store.at("once").read(name) == store.at("again").read(name), name


@pytest.mark.parametrize("first", ["cpu", "cuda"])
def test_a_checkpoint_of_another_device_is_gone_on_from(first: str, store: Store) -> None:
    then = {"cpu": "cuda", "cuda": "cpu"}[first]
    with pytest.raises(Killed):
        train(store.at("parts"), MODEL, 4, first, checkpoint_every=2, progress=stop)
    train(store.at("parts"), MODEL, 4, then, checkpoint_every=2)
    train(store.at("whole"), MODEL, 4, then)
    assert losses(store.at("parts")) == pytest.approx(losses(store.at("whole")), rel=1e-3)


def test_batches_gathered_on_the_card_are_those_of_the_host() -> None:
    rows, settings = data(50), {"seed": 0, "batch_size": 16, "class_dropout": 0.25}
    there, here = (TrainCodes(rows, space_of(INFO), device=device, **settings) for device in ("cuda", "cpu"))  # type: ignore[arg-type]
    for step in range(6):
        found, wanted = there.batch(step), here.batch(step)
        assert found.codes.is_cuda
        assert torch.equal(found.codes.cpu(), wanted.codes)
        assert torch.equal(found.classes.cpu(), wanted.classes)


@every_model
def test_no_step_between_two_logged_lines_waits_for_the_gpu(
    model: GeneratorConfig | MaskedConfig, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = contextlib.ExitStack()
    update = Learner.update

    def watched(self: Learner, step: int) -> dict[str, Tensor | float]:
        made = update(self, step)
        if step == 3:
            refused.enter_context(waiting_refused())
        if step == 6:
            refused.close()
        return made

    monkeypatch.setattr(Learner, "update", watched)
    run = TrainingRun(store, seed=0, device="cuda")
    with refused:
        train_generator(data(), data(seed=1), INFO, model, config(10, micro_batch=8, log_every=1000), run=run)
