"""Ranks that share a generator's weights learn what one rank learns, whether they hold all of them or a part."""

import os
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load

from generator.code_space import CodeSpace
from generator.config import GENERATORS, AnyGeneratorConfig, GeneratorConfig, GeneratorTrainingConfig, MaskedConfig
from generator.data import space_of
from generator.kinds import build_generator
from generator.train import shard_if_large, train_generator
from infra.compute.cluster import session
from infra.compute.ranks import ALONE, Ranks, run_ranks
from infra.progress import Progress
from infra.store.store import Store
from infra.training.learner import Learner, OptimizerPlan
from infra.training.loop import TrainingRun, TrainResult
from infra.training.parallel import choose_parallel
from tests.generator.test_train import INFO, config, data
from tests.sftok.training.test_stages import losses

KINDS: dict[str, AnyGeneratorConfig] = {
    "autoregressive": GeneratorConfig(width=32, layers=2, heads=2, ffn_width=48, dropout=0.1),
    "tied": GeneratorConfig(width=32, layers=2, heads=2, ffn_width=48, dropout=0.0, tied=True),
    "masked": MaskedConfig(width=32, layers=2, heads=2, ffn_width=48, dropout=0.0),
}
STEPS = 6


class Case(NamedTuple):
    """How a generator is trained."""

    kind: str
    parallel: str
    ranks: int
    on_node: int
    precision: str = "fp32"

    @property
    def name(self) -> str:
        return "-".join(map(str, self))

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("autoregressive", "ddp", 2, 2),
    Case("autoregressive", "fsdp", 2, 2),
    Case("tied", "fsdp", 2, 2),
    Case("masked", "fsdp", 2, 2),
    Case("autoregressive", "fsdp", 2, 2, "bf16"),
]
# Each number of ranks takes seconds to start.
LARGER = [
    Case("autoregressive", "fsdp", 4, 4),
    Case("autoregressive", "hsdp", 4, 2),
    Case("autoregressive", "fsdp", 3, 3),  # of four micro-batches: two ranks keep the first company
    Case("autoregressive", "ddp", 3, 3),
]


def train(store: Store, case: Case, ranks: Ranks, device: str = "cpu") -> TrainResult:
    training = config(STEPS, micro_batch=4, keep="best", validate_every=3, checkpoint_every=4, parallel=case.parallel)
    training = GeneratorTrainingConfig.model_validate({**training.as_json(), "precision": case.precision})
    run = TrainingRun(store.at(case.name), seed=0, ranks=ranks, device=device)
    return train_generator(data(), data(40, seed=1), INFO, KINDS[case.kind], training, run=run)


def train_all(store: Store, cases: list[Case], ranks: Ranks, progress: Progress) -> dict[str, TrainResult]:
    done = {}
    for case in cases:
        os.environ["LOCAL_WORLD_SIZE"] = str(case.on_node)
        done[case.name] = train(store, case, ranks)
    return done


def held(model: AnyGeneratorConfig, parallel: str, ranks: Ranks) -> tuple[int, int]:
    """Count the values that a rank keeps between steps, and those of the whole network."""
    network = build_generator(model, space_of(INFO))
    whole = sum(p.numel() for p in network.parameters())
    training = config(1, parallel=parallel)
    shard_if_large(network, training, TrainingRun(Store("."), seed=0, ranks=ranks))
    learner = Learner(network, OptimizerPlan.of(training, ranks))
    (learner.network(torch.zeros(2, dtype=torch.long), torch.zeros(2, 4, dtype=torch.long)).sum()).backward()
    learner.update(0)
    states = [t for state in learner.optimizer.state.values() for t in state.values() if t.ndim]
    kept = [*learner.optimizer.param_groups[0]["params"], *learner.optimizer.param_groups[1]["params"]]
    mine = sum(t.numel() for t in [*kept, *learner.ema.values(), *states])
    return sum(ranks.all_of(mine, "cpu")), whole


class Trained(NamedTuple):
    """What two ranks made, which takes seconds to start."""

    store: Store
    results: dict[str, TrainResult]
    held: dict[str, tuple[int, int]]


def train_and_count(
    store: Store, ranks: Ranks, progress: Progress
) -> tuple[dict[str, TrainResult], dict[str, tuple[int, int]]]:
    counts = {parallel: held(KINDS["autoregressive"], parallel, ranks) for parallel in ("ddp", "fsdp")}
    return train_all(store, CASES, ranks, progress), counts


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    store = Store(tmp_path_factory.mktemp("parallel"))
    with session(num_cpus=4):
        yield Trained(store, *run_ranks(partial(train_and_count, store), 2))


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(c, marks=pytest.mark.slow) for c in LARGER)], ids=str)
def test_ranks_learn_what_one_learns(case: Case, store: Store, trained: Trained) -> None:
    folder, results, _ = trained
    if case not in CASES:
        results = run_ranks(partial(train_all, folder, [case]), case.ranks)
    alone, shared = train(store, case, ALONE), results[case.name]
    rounding = 1e-4 if case.precision == "fp32" else 2e-2
    assert losses(folder.at(case.name)) == pytest.approx(losses(store.at(case.name)), rel=rounding)
    assert shared.metrics["val_nll"] == pytest.approx(alone.metrics["val_nll"], rel=rounding)
    assert [file.path for file in shared.files] == [file.path for file in alone.files]
    ours, theirs = (load(root.at(case.name).read("model.safetensors")) for root in (folder, store))
    assert ours.keys() == theirs.keys()
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < 50 * rounding


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_rank_goes_on_from_what_several_have_saved(case: Case, store: Store, trained: Trained) -> None:
    folder = trained.store.at(case.name)
    for key in folder.list("checkpoints/"):
        store.at(case.name).write(key, folder.read(key))
    train(store, case, ALONE)
    rounding = 1e-4 if case.precision == "fp32" else 2e-2
    ours, theirs = losses(store.at(case.name)), losses(folder)
    assert ours[:4] == theirs[:4]
    assert ours == pytest.approx(theirs, rel=rounding)
    weights = [load(place.read("model.safetensors")) for place in (store.at(case.name), folder)]
    assert max((weights[0][name] - weights[1][name]).abs().max().item() for name in weights[0]) < 50 * rounding


def train_on_gpu(store: Store, case: Case, ranks: Ranks, progress: Progress) -> TrainResult:
    del progress
    return train(store, case, ranks, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_gpus_learn_what_one_learns(parallel: str, store: Store) -> None:
    """Sums by NCCL, beside and between the kernels of the backward pass."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    case = Case("tied", parallel, 2, 2)  # without dropout, whose noise depends on the device
    shared = run_ranks(partial(train_on_gpu, store.at("two"), case), 2, gpus=1.0)
    alone = train(store.at("one"), case, ALONE, "cuda")
    assert losses(store.at("two", case.name)) == pytest.approx(losses(store.at("one", case.name)), rel=1e-3)
    assert shared.metrics["val_nll"] == pytest.approx(alone.metrics["val_nll"], rel=1e-3)


@pytest.mark.parametrize(("parallel", "copies"), [("fsdp", 1), ("ddp", 2)])
def test_shards_hold_each_value_once(parallel: str, copies: int, trained: Trained) -> None:
    """Weights, EMA and two moments: four values a parameter, in all ranks together."""
    total, whole = trained.held[parallel]
    assert total == 4 * whole * copies


@pytest.mark.parametrize(("preset", "expected"), [("XL", "fsdp"), ("L", "ddp")])
def test_large_generators_are_sharded_unless_asked_otherwise(preset: str, expected: str) -> None:
    with torch.device("meta"):
        network: Any = build_generator(GENERATORS[preset], CodeSpace(8192, 64, 1000))
    assert choose_parallel("auto", network, "bf16") == expected
    assert choose_parallel("hsdp", network, "bf16") == "hsdp"
    assert choose_parallel("auto", network, "fp16") == "ddp"


def test_shards_with_scaled_losses_are_refused() -> None:
    with pytest.raises(ValueError, match=r'set precision to "bf16", or parallel to "ddp"'):
        GeneratorTrainingConfig.model_validate({**config(1).as_json(), "parallel": "fsdp", "precision": "fp16"})
