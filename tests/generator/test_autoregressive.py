"""The autoregressive generator: sizes, parity, effects of its options, and rejected inputs."""

from copy import deepcopy

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from generator.artifacts import load_generator, save_generator
from generator.autoregressive import Generator
from generator.code_space import CodeSpace
from generator.config import GENERATORS, AnyGeneratorConfig, GeneratorConfig, MaskedConfig, SampleConfig
from generator.objectives import held_out_losses
from generator.sampling.autoregressive import advance_of, pick_of
from generator.sampling.prepared import PackedGenerator
from infra.store.store import Store
from tests.support.small_generators import INFO, SPACE, autoregressive

IMAGENET = CodeSpace(codebook_size=8192, num_tokens=64, num_classes=1000)
RANDOM = {"kind": "annealed", "start_step": 1, "end_step": 2}
VARIANTS: dict[str, dict[str, object]] = {
    "plain": {},
    "qk_norm": {"qk_norm": True},
    "tied": {"tied": True},
    "fixed": {"order": {"kind": "fixed", "seed": 2}},
    "annealed": {"order": RANDOM, "qk_norm": True},
}


SIZES = {"B": 98.3, "L": 326.1, "XL": 753.7, "XXL": 1385.8, "3B": 3044.2}


@pytest.mark.parametrize(("size", "millions"), SIZES.items())
def test_presets_have_the_stated_sizes(size: str, millions: float) -> None:
    with torch.device("meta"):
        model = Generator(GENERATORS[size], IMAGENET)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_a_tied_head_saves_its_weights() -> None:
    sizes = {}
    for tied in (False, True):
        with torch.device("meta"):
            model = Generator(GENERATORS["B"].model_copy(update={"tied": tied}), IMAGENET)
        sizes[tied] = sum(p.numel() for p in model.parameters())
    assert sizes[False] - sizes[True] == 8192 * 768


@pytest.mark.parity
def test_it_computes_what_a_llama_of_the_same_weights_does() -> None:
    from transformers import LlamaConfig, LlamaModel

    model = autoregressive(width=32, heads=4, ffn_width=40)
    config = LlamaConfig(
        vocab_size=1,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        rms_norm_eps=1e-6,
        max_position_embeddings=6,
    )
    llama = LlamaModel(config).eval()
    state = {"embed_tokens.weight": torch.zeros(1, 32), "norm.weight": model.norm_out.weight}
    for i, block in enumerate(model.blocks):
        q, k, v = block.attention.qkv.weight.chunk(3)
        gate, up = block.feed_forward.gate_up.weight.chunk(2)
        state |= {
            f"layers.{i}.{name}.weight": weight
            for name, weight in {
                "self_attn.q_proj": q,
                "self_attn.k_proj": k,
                "self_attn.v_proj": v,
                "self_attn.o_proj": block.attention.out.weight,
                "mlp.gate_proj": gate,
                "mlp.up_proj": up,
                "mlp.down_proj": block.feed_forward.down.weight,
                "input_layernorm": block.norm_1.weight,
                "post_attention_layernorm": block.norm_2.weight,
            }.items()
        }
    llama.load_state_dict(state)
    classes, codes = torch.tensor([0, 3]), torch.randint(11, (2, 6))
    inputs = torch.cat([model.class_embed(classes)[:, None], model.code_embed(codes[:, :-1])], dim=1)
    wanted = llama(inputs_embeds=inputs).last_hidden_state @ model.head.weight.T
    assert torch.allclose(model(classes, codes), wanted, atol=2e-5)


def cached_logits(network: Generator | PackedGenerator, classes: Tensor, codes: Tensor) -> Tensor:
    """Compute logits by cached steps, in the dataset's layout."""
    cache, x_BW = network.empty_cache(len(codes)), network.class_embed(classes)
    found = torch.empty(*codes.shape, network.space.codebook_size)
    for step in range(codes.shape[1]):
        place = network.order[step]
        found[:, place] = network.step(x_BW, torch.tensor(step), cache).float()
        x_BW = network.code_embed(codes[:, place])
    return found


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_cached_steps_equal_the_full_forward(variant: str) -> None:
    model = autoregressive(**VARIANTS[variant])
    classes, codes = torch.tensor([0, 2, 3]), torch.randint(11, (3, 6))
    full = model(classes, codes)
    assert full.std() > 0.3
    assert torch.allclose(cached_logits(model, classes, codes), full, atol=1e-5)
    assert torch.allclose(cached_logits(PackedGenerator(model, torch.float32), classes, codes), full, atol=1e-5)
    rounded = cached_logits(PackedGenerator(model, torch.bfloat16), classes, codes)
    assert torch.allclose(rounded, full, atol=0.15)
    assert not torch.allclose(rounded, full, atol=1e-4)


def test_positions_matter_in_one_dimension() -> None:
    """Rotary positions: a sequence of equal codes still gives different logits at each position."""
    logits = autoregressive()(torch.tensor([1]), torch.full((1, 6), 5))
    assert not torch.allclose(logits[0, 2], logits[0, 5], atol=1e-3)


def test_normalised_queries_and_keys_do_not_grow_with_their_weights() -> None:
    for qk_norm in (False, True):
        model = autoregressive(qk_norm=qk_norm)
        grown, codes = deepcopy(model), torch.randint(11, (1, 6))
        with torch.no_grad():
            for block in grown.blocks:
                block.attention.qkv.weight[:32].mul_(8)
        same = torch.allclose(model(torch.tensor([0]), codes), grown(torch.tensor([0]), codes), atol=1e-3)
        assert same == qk_norm


@pytest.mark.parametrize("variant", ["plain", "annealed"])
def test_recomputing_blocks_changes_no_gradient(variant: str) -> None:
    model = autoregressive(**VARIANTS[variant]).train()
    codes = torch.randint(11, (2, 6))
    found = []
    for on in (False, True):
        model.recompute(on)
        model.zero_grad()
        keys = torch.tensor([3, 4])  # of dropout
        model.training_loss(torch.tensor([0, 1]), codes, None, keys, label_smoothing=0.0).backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_one_batch_is_learnt_by_heart_in_random_orders() -> None:
    model = autoregressive(order=RANDOM, dropout=0.0).train()
    codes, classes = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(0)), torch.arange(4)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(80):
        view = model.draw_view(4, step=0, generator=torch.Generator().manual_seed(step))
        loss = model.training_loss(classes, codes, view, label_smoothing=0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3
    assert held_out_losses(model.eval(), classes, codes, torch.Generator(), len(codes)).losses.mean().item() < 0.3


def test_bf16_weights_keep_exact_positions() -> None:
    """Guards against angles in bf16, which cannot distinguish positions 60 and 61."""
    model = autoregressive(space=SPACE._replace(num_tokens=64)).to(torch.bfloat16)
    model.place_tables()
    assert model.cos.dtype == torch.float32
    assert model(torch.tensor([0]), torch.zeros(1, 64, dtype=torch.long)).dtype == torch.bfloat16


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_generator_comes_back(variant: str, store: Store) -> None:
    model = autoregressive(**VARIANTS[variant])
    save_generator(model, INFO, store)
    loaded, info = load_generator(store)
    classes, codes = torch.tensor([0, 3]), torch.randint(11, (2, 6))
    assert info == INFO
    assert loaded.config == model.config
    assert torch.equal(loaded(classes, codes), model(classes, codes))


def test_configs_are_told_apart_by_their_kind() -> None:
    read = TypeAdapter(AnyGeneratorConfig)
    old = {"width": 32, "layers": 1, "heads": 2, "ffn_width": 64}
    assert read.validate_python(old) == GeneratorConfig(**old)
    for config in (GeneratorConfig(), MaskedConfig()):
        assert read.validate_json(read.dump_json(config)) == config
        assert read.validate_python(config) == config
    with pytest.raises(ValueError, match=r"kind"):
        read.validate_python({"kind": "diffusion"})


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"width = 30 is not a multiple of 2 \* heads = 8"):
        GeneratorConfig(width=30, heads=4)
    with pytest.raises(ValueError, match=r"width = 30 is not a multiple of heads = 4"):
        MaskedConfig(width=30, heads=4)


def test_codes_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^5 codes per sequence, but the generator has 6$"):
        autoregressive()(torch.tensor([0]), torch.zeros(1, 5, dtype=torch.long))


class Dispatched(TorchDispatchMode):
    """Mode that records the operations that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(func))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True, "order": RANDOM}])
def test_no_step_waits_for_a_value_on_the_host(changes: dict[str, object]) -> None:
    """Guards against host synchronization, which breaks CUDA graphs, such as indexing with the position itself."""
    network, config = autoregressive(**changes), SampleConfig(cfg_scale=2.0, top_k=5, top_p=0.9)
    advance, cache = advance_of(network, pick_of(network, config)), network.empty_cache(4)
    x_RW, uniform_B = network.class_embed(torch.tensor([0, 1, 3, 3])), torch.rand(2, dtype=torch.float64)
    with torch.no_grad(), Dispatched() as seen:
        advance(x_RW, torch.tensor(0), uniform_B, torch.tensor(2.0), cache)
    assert "aten.mm.default" in seen.names
    assert [name for name in seen.names if "_local_scalar_dense" in name or "nonzero" in name] == []
    assert "aten.constant_pad_nd.default" not in seen.names  # what torch before 2.14 loses on CUDA


@pytest.mark.parametrize("packed", [False, True])
def test_a_cache_that_is_too_short_is_refused(packed: bool) -> None:
    model = autoregressive()
    network = PackedGenerator(model, torch.float32) if packed else model
    other = autoregressive(space=SPACE._replace(num_tokens=4))
    short = (PackedGenerator(other, torch.float32) if packed else other).empty_cache(2)
    with pytest.raises(ValueError, match=r"of 4 codes, not .* make it with empty_cache\(2\)"):
        network.step(torch.zeros(2, 16), torch.tensor(0), short)
    with pytest.raises(ValueError, match=r"make it with empty_cache\(3\)"):
        network.step(torch.zeros(3, 16), torch.tensor(0), network.empty_cache(2))
