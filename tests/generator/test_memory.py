"""Memory of a generator's training, counted from its configs: by blocks, by part, and beside what is really held."""

import pytest
import torch

from generator import memory
from generator.config import GENERATORS, MASKED_GENERATORS, AnyGeneratorConfig, GeneratorTrainingConfig
from generator.data import CodeData, space_of
from generator.kinds import build_generator
from generator.memory import training_memory
from generator.train import training_step
from infra.codes.contract import CodesInfo
from infra.compute.ranks import Ranks
from infra.store.store import Store
from infra.training.config import OptimizerConfig
from infra.training.learner import Learner, OptimizerPlan
from infra.training.loop import TrainingRun
from infra.training.memory import RESERVED, MemoryNeed, Spread

INFO = CodesInfo(
    tokenizer="t", codebook_size=512, num_tokens=16, image_size=32, assignment="nearest", precision="fp32",
    class_names=("a", "b"),
)  # fmt: skip
SPACE = space_of(INFO)
KINDS: dict[str, AnyGeneratorConfig] = {"autoregressive": GENERATORS["toy"], "masked": MASKED_GENERATORS["toy"]}
every_kind = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)


def training(**changes: object) -> GeneratorTrainingConfig:
    settings = {"steps": 4, "batch_size": 64, "micro_batch": 16, "precision": "bf16", "optimizer": OptimizerConfig()}
    return GeneratorTrainingConfig.model_validate({**settings, **changes})


def of_held(need: MemoryNeed) -> int:
    return need.weights + need.gradients + need.moments + need.ema + need.best


@every_kind
@pytest.mark.parametrize("recomputes", [False, True])
def test_few_blocks_tell_what_all_take(
    config: AnyGeneratorConfig, recomputes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, changes = config.model_copy(update={"layers": 7}), training(activation_checkpointing=recomputes)
    by_blocks = training_memory(config, changes, SPACE)
    monkeypatch.setattr(memory, "FEW", 7)
    assert training_memory(config, changes, SPACE) == by_blocks


@every_kind
@pytest.mark.parametrize("keep", ["last", "best"])
def test_what_is_held_is_what_a_learner_holds(config: AnyGeneratorConfig, keep: str) -> None:
    with torch.device("cpu"):
        network = build_generator(config, SPACE)
    network.initialise()
    settings = training(keep=keep)
    learner = Learner(network, OptimizerPlan.of(settings, Ranks()))
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    learner.optimizer.step()
    moments = [v for state in learner.optimizer.state.values() for k, v in state.items() if k.startswith("exp_avg")]
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    held = [*network.parameters(), *learner.ema.values(), *moments, *gradients]
    held += learner.ema.values() if keep == "best" else []
    assert of_held(training_memory(config, settings, SPACE)) == sum(4 * tensor.numel() for tensor in held)


@every_kind
def test_shards_divide_what_is_held_and_gather_two_blocks(config: AnyGeneratorConfig) -> None:
    sharded = training(parallel="fsdp")
    alone, four, eight = (training_memory(config, sharded, SPACE, ranks=ranks) for ranks in (1, 4, 8))
    assert of_held(four) == pytest.approx(of_held(alone) / 4, rel=0.01)
    assert of_held(eight) == pytest.approx(of_held(alone) / 8, rel=0.01)
    block = sum(p.numel() for p in build_generator(config, SPACE).blocks[0].parameters())
    assert alone.gathered == 0 < 2 * 2 * block < four.gathered == eight.gathered
    replicas = training_memory(config, training(parallel="ddp"), SPACE, ranks=8)
    assert (of_held(replicas), replicas.gathered) == (of_held(alone), 0)
    by_node = training_memory(config, training(parallel="hsdp"), SPACE, ranks=8, ranks_per_node=4)
    assert of_held(by_node) == of_held(four)


def test_the_preset_of_3_billion_is_sharded_and_needs_it() -> None:
    """7.6 GB of weights, gradients, moments and EMA for each of eight ranks, 61 for one."""
    space = SPACE._replace(codebook_size=8192, num_tokens=64, num_classes=1000)
    settings = training(batch_size=2048, micro_batch=64)
    one, eight = (training_memory(GENERATORS["3B"], settings, space, ranks=ranks) for ranks in (1, 8))
    assert of_held(one) / 1e9 == pytest.approx(20 * 3.044, rel=0.001)
    assert of_held(eight) == pytest.approx(of_held(one) / 8, rel=0.001)
    assert not one.fits(80 * 10**9)
    assert eight.fits(40 * 10**9)


@every_kind
def test_passes_take_more_for_more_rows_codes_and_bits(config: AnyGeneratorConfig) -> None:
    base = training_memory(config, training(), SPACE)
    more_rows = training_memory(config, training(micro_batch=32), SPACE)
    assert 1.7 < more_rows.activations / base.activations < 2.05
    more_codes = training_memory(config, training(), SPACE._replace(codebook_size=4096))
    assert more_codes.logits > 4 * base.logits > 0
    assert more_codes.activations == base.activations
    full = training_memory(config, training(precision="fp32"), SPACE)
    recomputed = training_memory(config, training(activation_checkpointing=True), SPACE)
    assert full.activations > base.activations > recomputed.activations
    if config.kind == "autoregressive":  # the masked one's attention weights are dropped from, so they are there
        assert training_memory(config, training(), SPACE, fused_attention=False).activations > base.activations


@every_kind
def test_gradients_that_come_as_activations_go_are_not_counted_twice(config: AnyGeneratorConfig) -> None:
    whole = training_memory(config, training(batch_size=16, micro_batch=0), SPACE)
    assert whole.total < training_memory(config, training(), SPACE).total
    replica = training_memory(config, training(batch_size=32, micro_batch=16), SPACE, ranks=2)
    assert replica.total == training_memory(config, training(), SPACE).total


def test_a_card_has_room_for_what_is_needed_and_the_libraries() -> None:
    need = MemoryNeed(weights=4, activations=6)
    assert need.parts() == {"activations": 6, "weights": 4}
    assert need.fits(10 + RESERVED)
    assert not need.fits(9 + RESERVED)
    assert Spread.of("fsdp", 1) == Spread.of("ddp", 1) == Spread(1)


@pytest.mark.gpu
@pytest.mark.parametrize("recomputes", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("config", [GENERATORS["B"], MASKED_GENERATORS["published"]], ids=["B", "published"])
def test_a_gpu_allocates_as_much_as_is_counted(config: AnyGeneratorConfig, recomputes: bool, store: Store) -> None:
    info = INFO.model_copy(update={"codebook_size": 8192, "num_tokens": 64})
    settings = training(batch_size=256, micro_batch=64, activation_checkpointing=recomputes, compile=False)
    space = space_of(info)
    need = training_memory(config, settings, space)
    before = torch.cuda.memory_allocated()
    network = build_generator(config, space)
    network.initialise()
    network.to("cuda").recompute(recomputes)
    learner = Learner(network, OptimizerPlan.of(settings, Ranks()))
    data = CodeData(torch.zeros(256, dtype=torch.int32), torch.zeros(256, 64, dtype=torch.uint16))
    step = training_step(network, learner, data, settings, TrainingRun(store, seed=0, device="cuda"))
    torch.cuda.reset_peak_memory_stats()
    for index in range(3):
        step(index)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before == pytest.approx(need.total, rel=0.15)
