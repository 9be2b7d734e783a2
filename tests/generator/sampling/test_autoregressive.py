"""Sampling compared with plain references on small vocabularies."""

import itertools
import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.exc import InvalidCxxCompiler

from generator.autoregressive import Generator
from generator.code_space import CodeSpace
from generator.config import SampleConfig
from generator.kinds import prepare_sampler
from generator.sampling.autoregressive import Sampler, advance_of, pick_of
from generator.sampling.compiled import compiled
from generator.sampling.filters import LIKELIEST, draw, filter_logits, guidance_scales, guide, invert, nucleus_floor
from generator.sampling.prepared import PreparedAutoregressive, typed_copy
from infra.compute.compiler import compile_in_place
from tests.support.plain_sampling import sample
from tests.support.small_generators import SPACE, autoregressive, masked, uniform

RANDOM = {"kind": "annealed", "start_step": 1, "end_step": 2}
VARIANTS: dict[str, dict[str, object]] = {
    "plain": {},
    "qk_norm": {"qk_norm": True},
    "tied": {"tied": True},
    "fixed": {"order": {"kind": "fixed", "seed": 2}},
    "annealed": {"order": RANDOM},
    "heads of 10": {"width": 20, "heads": 2},  # no power of two, as those of the preset 3B, which are 100 wide
}


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest) -> Generator:
    return autoregressive(**VARIANTS[request.param])


def plain_sample(model: Generator, classes: Tensor, numbers: Tensor, config: SampleConfig) -> Tensor:
    """Sample without cache or batch: a full forward pass per code, inverting the cumulative sum by a loop."""
    codes = torch.zeros(len(classes), SPACE.num_tokens, dtype=torch.long)
    scales = guidance_scales(config, SPACE.num_tokens)
    for row, class_id in enumerate(classes):
        for step, place in enumerate(model.order.tolist()):
            cond, uncond = (
                model(torch.tensor([c]), codes[row : row + 1])[0, place] for c in (class_id, SPACE.null_class)
            )
            logits = uncond + scales[step] * (cond - uncond)
            kept = sorted(reference_filter(logits / config.temperature, config.top_k, config.top_p))
            probability = (logits[kept].double() / config.temperature).softmax(0).tolist()
            left = numbers[row, step].item()
            for code, p in zip(kept, probability, strict=True):
                if left >= 0:
                    codes[row, place] = code
                left -= p
    return codes


def reference_filter(logits: Tensor, top_k: int, top_p: float) -> set[int]:
    """Return the codes that nucleus filtering keeps, by a plain loop."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i].item())
    if top_k:
        order = order[:top_k]
    probability = torch.softmax(logits[order].double(), 0).tolist()
    kept, held = set(), 0.0
    for i, p in zip(order, probability, strict=True):
        if held >= top_p:
            break
        kept.add(i)
        held += p
    return kept


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cfg_scale": 3.0},
        {"cfg_scale": 4.0, "cfg_schedule": "power_cosine", "cfg_power": 1.5, "temperature": 0.7},
        {"cfg_scale": 2.0, "top_k": 5, "top_p": 0.8},
    ],
)
@torch.no_grad()
def test_samples_are_those_of_a_plain_loop(model: Generator, changes: dict[str, object]) -> None:
    config, classes = SampleConfig.model_validate(changes), torch.tensor([0, 1, 2, 3])
    wanted = plain_sample(model, classes, uniform(4, 6), config)
    assert torch.equal(sample(model, classes, uniform(4, 6), config), wanted)
    assert torch.equal(prepare_sampler(model, config)(classes, uniform(4, 6)), wanted)


@torch.no_grad()
def test_three_tokens_are_sampled_as_enumerated() -> None:
    """Compare counts of all 27 sequences, with guidance, with their exact probabilities (chi-square)."""
    model, count = autoregressive(space=CodeSpace(3, 3, 1)), 8192
    config = SampleConfig(cfg_scale=1.5, temperature=1.2)
    codes = prepare_sampler(model, config)(torch.zeros(count, dtype=torch.long), uniform(count, 3))
    found, statistic = Counter(map(tuple, codes.tolist())), 0.0
    for sequence in itertools.product(range(3), repeat=3):
        ids = torch.tensor([sequence])
        cond, uncond = model(torch.tensor([0]), ids)[0], model(torch.tensor([1]), ids)[0]
        log_p = ((uncond + 1.5 * (cond - uncond)) / 1.2).log_softmax(-1)
        wanted = count * log_p.gather(-1, ids[0][:, None]).sum().exp().item()
        statistic += (found[sequence] - wanted) ** 2 / wanted
    assert statistic < 54  # 26 degrees of freedom: exceeded once in a thousand


def test_scale_one_is_conditional_only(model: Generator) -> None:
    classes = torch.tensor([0, 1, 2])
    plain = sample(model, classes, uniform(3, 6), SampleConfig(cfg_scale=1.0))
    almost = sample(model, classes, uniform(3, 6), SampleConfig(cfg_scale=1.0 + 1e-9))  # the guided path
    assert torch.equal(plain, almost)


def test_without_guidance_rows_are_not_doubled() -> None:
    model, rows = autoregressive(), []
    step = model.step
    model.step = lambda x, position, cache: (rows.append(len(x)), step(x, position, cache))[1]  # type: ignore[method-assign]
    for scale in (1.0, 2.0):
        sample(model, torch.tensor([0, 1]), uniform(2, 6), SampleConfig(cfg_scale=scale))
    assert rows == [2] * 6 + [4] * 6


def test_scale_zero_ignores_the_class(model: Generator) -> None:
    numbers = uniform(1, 6).expand(4, -1)
    unconditional = sample(model, torch.tensor([0, 1, 2, 3]), numbers, SampleConfig(cfg_scale=0.0))
    assert (unconditional == unconditional[0]).all()


def test_guidance_follows_its_formula() -> None:
    cond, uncond = torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 1.0]])
    assert torch.equal(guide(cond, uncond, 2.5), torch.tensor([[2 + 2.5 * -1, 1 + 2.5 * 2]]))


def test_schedules_grow_from_one() -> None:
    """Follows method.md 1.5 in this project's convention: (s - 1) * (1 - cos(pi (step / T)^p)) / 2 + 1."""
    config = SampleConfig(cfg_scale=5.0)
    assert guidance_scales(config, 4) == [5.0] * 4
    assert guidance_scales(config.model_copy(update={"cfg_schedule": "linear"}), 4) == [1.0, 2.0, 3.0, 4.0]
    power = config.model_copy(update={"cfg_schedule": "power_cosine", "cfg_power": 2.75})
    wanted = [4.0 * (1 - math.cos(math.pi * (step / 64) ** 2.75)) / 2 + 1 for step in range(64)]
    assert guidance_scales(power, 64) == pytest.approx(wanted)
    assert guidance_scales(power, 64)[0] == 1.0
    assert guidance_scales(power.model_copy(update={"cfg_scale": 1.0}), 64) == [1.0] * 64


def test_temperature_zero_takes_the_most_likely_code(model: Generator) -> None:
    config = SampleConfig(temperature=0)
    codes = sample(model, torch.tensor([1]), uniform(1, 6), config)
    assert torch.equal(model(torch.tensor([1]), codes).argmax(-1), codes)
    assert torch.equal(prepare_sampler(model, config)(torch.tensor([1]), uniform(1, 6)), codes)


@pytest.mark.parametrize("top_k", [0, 1, 3, 11, 50])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.7, 1.0])
def test_filters_equal_a_plain_loop(top_k: int, top_p: float) -> None:
    logits = torch.randn(8, 11, generator=torch.Generator().manual_seed(0)) * 2
    filtered = filter_logits(logits, top_k, top_p)
    for row, kept in zip(logits, filtered.isfinite(), strict=True):
        assert set(kept.nonzero()[:, 0].tolist()) == reference_filter(row, top_k, top_p)


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.9999999])
def test_the_nucleus_of_a_large_vocabulary_needs_no_full_sort_and_is_exact(top_p: float) -> None:
    """Peaked rows take the fast path, flat ones the full sort; both equal a plain loop."""
    sharpness = torch.tensor([[8.0], [2.0], [0.3], [0.0]])
    logits = torch.randn(4, 4 * LIKELIEST, generator=torch.Generator().manual_seed(0)) * sharpness
    logits[3] = torch.arange(4 * LIKELIEST) * 1e-6  # all but uniform, without ties
    filtered = filter_logits(logits, 0, top_p)
    for row, kept in zip(logits[:3], filtered.isfinite(), strict=False):
        probability = row.softmax(0)
        order = probability.argsort(descending=True)
        count = 1 + int((probability[order].double().cumsum(0) < top_p).sum())
        assert set(kept.nonzero()[:, 0].tolist()) == set(order[:count].tolist())
    assert filtered[3].isfinite().float().mean().item() == pytest.approx(top_p, abs=1e-2)


def test_a_rows_nucleus_does_not_depend_on_the_others() -> None:
    peaked, flat = (torch.randn(3, 2 * LIKELIEST, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    peaked = (peaked * 9).softmax(-1)
    both = nucleus_floor(torch.cat([peaked, flat.softmax(-1)]), 0.9)
    assert torch.equal(both[:3], nucleus_floor(peaked, 0.9))


def test_codes_as_likely_as_the_last_one_kept_are_kept() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 0.0]])
    assert filter_logits(logits, 2, 1.0).isfinite().tolist() == [[True, True, True, False]]
    assert filter_logits(logits, 0, 0.6).isfinite().tolist() == [[True, True, True, False]]


@pytest.mark.parametrize("size", [4, 128, 300])
def test_draws_follow_the_distribution(size: int) -> None:
    logits = torch.randn(1, size, generator=torch.Generator().manual_seed(0)) * 2
    numbers = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    codes = draw(logits.expand(20_000, -1), numbers, SampleConfig(temperature=2.0))
    share = torch.bincount(codes, minlength=size) / 20_000
    assert torch.allclose(share, (logits[0] / 2).softmax(0), atol=1e-3)
    wanted = torch.searchsorted((logits[0] / 2).softmax(0).double().cumsum(0), numbers, right=True)
    assert (codes == wanted).float().mean() > 0.9999


@pytest.mark.parametrize("size", [4, 128, 300])
def test_a_number_at_either_end_draws_a_possible_code(size: int) -> None:
    probability = torch.zeros(2, size)
    probability[:, 1:3] = 0.1  # a sum that rounds
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert invert(probability, ends).tolist() == [1, 2]
    assert invert(probability[:1] / 3, torch.ones(1, dtype=torch.float64)).tolist() == [2]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_sample_does_not_depend_on_its_batch_mates(model: Generator, precision: str) -> None:
    classes, numbers = torch.tensor([0, 1, 2, 0]), uniform(4, 6)
    sampler = prepare_sampler(model, SampleConfig(cfg_scale=2.0, top_p=0.9, precision=precision))
    together, order = sampler(classes, numbers), torch.tensor([2, 0, 3, 1])
    assert torch.equal(sampler(classes[order], numbers[order]), together[order])
    others = torch.cat([numbers[:1], uniform(3, 6, seed=8)])
    assert torch.equal(sampler(torch.tensor([0, 3, 3, 3]), others)[:1], together[:1])


def test_bf16_draws_almost_the_same(model: Generator) -> None:
    classes, numbers = torch.arange(32) % 4, uniform(32, 6)
    exact = sample(model, classes, numbers, SampleConfig())
    for twin in (prepare_sampler(model, SampleConfig(precision="bf16"))(classes, numbers),):
        assert (twin == exact).float().mean() > 0.8
    typed = sample(typed_copy(model, torch.bfloat16), classes, numbers, SampleConfig())
    assert (typed == exact).float().mean() > 0.8


def test_a_sampler_leaves_the_model_as_it_is(model: Generator) -> None:
    before = {name: t.clone() for name, t in model.state_dict().items()}
    prepare_sampler(model, SampleConfig(precision="bf16"))(torch.tensor([0]), uniform(1, 6))
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_without_classes_everything_is_of_the_null_class() -> None:
    model = autoregressive(space=SPACE._replace(num_classes=0))
    assert sample(model, torch.tensor([0, 0]), uniform(2, 6), SampleConfig()).shape == (2, 6)


def test_guidance_of_a_generator_without_classes_costs_nothing() -> None:
    """Conditional and unconditional rows would be equal."""
    model, rows = autoregressive(space=SPACE._replace(num_classes=0)), []
    sampler = prepare_sampler(model, SampleConfig(cfg_scale=3.0))
    step = sampler.advance
    sampler.advance = lambda x, *rest: (rows.append(len(x)), step(x, *rest))[1]
    found = sampler(torch.tensor([0, 0]), uniform(2, 6))
    assert torch.equal(found, sample(model, torch.tensor([0, 0]), uniform(2, 6), SampleConfig()))
    assert rows == [2] * 6


def test_all_scales_of_guidance_share_a_graph() -> None:
    prepared = PreparedAutoregressive(autoregressive(), "bf16", compile=True)

    def graph(**changes: float) -> object:
        sampler = prepared.sampler(SampleConfig.model_validate({"precision": "bf16", "compile": True, **changes}))
        assert isinstance(sampler, Sampler)
        return sampler.advance

    assert graph(cfg_scale=2.0) is graph(cfg_scale=3.0, cfg_schedule="linear")
    assert len({graph(), graph(cfg_scale=2.0), graph(temperature=0.5), graph(top_k=3)}) == 4
    with pytest.raises(ValueError, match="prepared for bf16, compile = True: prepare again for other settings"):
        prepared.sampler(SampleConfig())


@pytest.mark.slow
def test_a_compiled_step_in_bf16_is_nearly_that_of_the_modules() -> None:
    """Compiled and plain codes agree almost everywhere; compiled ones do not change with the order of rows."""
    model, config = autoregressive(), SampleConfig(cfg_scale=2.0, precision="bf16", compile=True)
    sampler, order = prepare_sampler(model, config), torch.randperm(48)
    classes, numbers = torch.arange(48) % 3, uniform(48, 6)
    found = sampler(classes, numbers)
    plain = sample(typed_copy(model, torch.bfloat16), classes, numbers, config)
    assert (found == plain).float().mean() > 0.8
    assert torch.equal(sampler(classes[order], numbers[order]), found[order])


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"cfg_scale": 2.0, "top_k": 8, "top_p": 0.9, "temperature": 0.9}])
def test_the_whole_step_is_one_graph(changes: dict[str, object]) -> None:
    """A step compiled with fullgraph serves all positions and draws the same codes."""
    model, classes = autoregressive(qk_norm=True, order=RANDOM), torch.tensor([0, 1, 2, 3])
    sampler = prepare_sampler(model, SampleConfig.model_validate({**changes, "compile": True}))
    plain = sample(model, classes, uniform(4, 6), SampleConfig.model_validate(changes))
    assert torch.equal(sampler(classes, uniform(4, 6)), plain)


@pytest.mark.slow
def test_compiled_functions_of_the_same_code_keep_their_own_weights() -> None:
    """Holds for more functions than PyTorch's recompile limit, and after another of the same shape was called."""

    def function_of(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
        return lambda x: layer(x).relu()

    layers, x = [nn.Linear(8, 8) for _ in range(10)], torch.randn(4, 8)
    functions = [compiled(function_of(layer), x.device) for layer in layers]
    with torch.inference_mode():
        for _ in range(2):
            for function, layer in zip(functions, layers, strict=True):
                assert torch.allclose(function(x), layer(x).relu(), atol=1e-5)


def test_a_missing_compiler_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", missing)
    refused = pytest.raises(ValueError, match=r"^compile = True needs a C\+\+ compiler.* install g\+\+")
    for model in (autoregressive(), masked()):
        with refused:
            prepare_sampler(model, SampleConfig(compile=True))
        with refused:
            compile_in_place(model)


@torch.no_grad()
def test_one_graph_serves_all_positions() -> None:
    """The step is traced once, without graph breaks: the position is data, not a constant of the graph."""
    graphs = []

    def count(module: torch.fx.GraphModule, _: list[Tensor]) -> object:
        graphs.append(module)
        return module.forward

    model, config = autoregressive(), SampleConfig(cfg_scale=2.0, top_k=8, top_p=0.9)
    advance = advance_of(model, pick_of(model, config))
    traced = torch.compile(advance, fullgraph=True, dynamic=False, backend=count)
    caches = [model.empty_cache(4) for _ in range(2)]
    xs = [model.class_embed(torch.tensor([0, 1, 3, 3]))] * 2
    for step in range(6):
        codes = []
        for i, function in enumerate((advance, traced)):
            code, xs[i] = function(xs[i], torch.tensor(step), uniform(2, seed=step), torch.tensor(2.0), caches[i])
            codes.append(code)
        assert torch.equal(*codes)
    assert len(graphs) == 1


@pytest.mark.parametrize(("class_id", "shown"), [(4, "4"), (-1, "-1")])
def test_class_ids_out_of_range_are_refused(class_id: int, shown: str) -> None:
    with pytest.raises(ValueError, match=rf"^class id {shown} is not in \[0, 3\] \(3: no class\)$"):
        sample(autoregressive(), torch.tensor([0, class_id]), uniform(2, 6), SampleConfig())


def test_numbers_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 5\), not \(2, 6\)"):
        sample(autoregressive(), torch.tensor([0, 1]), uniform(2, 5), SampleConfig())


def test_filters_that_keep_nothing_are_refused() -> None:
    for top_k, top_p in ((0, 0.0), (0, 1.5), (-1, 1.0)):
        with pytest.raises(ValueError, match=r"^top_[kp] = .* give [01] to keep all codes$"):
            filter_logits(torch.zeros(1, 4), top_k, top_p)
        with pytest.raises(ValueError, match=r"top_[kp]"):
            SampleConfig(top_k=top_k, top_p=top_p)


def test_negative_temperatures_are_refused() -> None:
    with pytest.raises(ValueError, match=r"temperature"):
        SampleConfig(temperature=-1.0)
    unchecked = SampleConfig().model_copy(update={"temperature": -1.0})
    with pytest.raises(ValueError, match=r"^temperature = -1.0 is negative: give 0 to take the most likely code$"):
        draw(torch.zeros(1, 4), uniform(1), unchecked)


def test_settings_of_masked_generators_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^num_steps = 4 has no effect on a generator that is autoregressive"):
        sample(autoregressive(), torch.tensor([0]), uniform(1, 6), SampleConfig(num_steps=4))
