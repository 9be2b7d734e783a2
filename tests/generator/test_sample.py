"""Sampling against plain references on small vocabularies."""

import pytest
import torch

from generator.config import GeneratorConfig, SampleConfig
from generator.model import CodeSpace, Generator
from generator.sample import draw, filter_logits, guide, sample

SPACE = CodeSpace(codebook_size=11, num_tokens=6, num_classes=3)


@pytest.fixture(params=[False, True], ids=["plain", "qk_norm"])
def model(request: pytest.FixtureRequest) -> Generator:
    torch.manual_seed(0)
    config = GeneratorConfig(width=16, layers=2, heads=2, ffn_width=24, dropout=0.1, qk_norm=request.param)
    made = Generator(config, SPACE)
    made.initialise()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(5 if parameter.ndim > 1 else 1)  # far from uniform
    return made.eval()


def uniform(batch: int) -> torch.Tensor:
    return torch.rand(batch, SPACE.num_tokens, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def test_cached_steps_equal_the_full_forward(model: Generator) -> None:
    classes, codes = torch.tensor([0, 2, 3]), torch.randint(11, (3, 6))
    full, cache = model(classes, codes), model.empty_cache(3)
    inputs = torch.cat([model.class_embed(classes)[:, None], model.code_embed(codes)], dim=1)
    for position in range(SPACE.num_tokens):
        assert torch.allclose(model.step(inputs[:, position], position, cache), full[:, position], atol=1e-5)


def test_a_code_does_not_see_those_after_it(model: Generator) -> None:
    codes = torch.randint(11, (1, 6))
    changed = codes.clone()
    changed[0, 3] = (codes[0, 3] + 1) % 11
    before, after = model(torch.tensor([1]), codes), model(torch.tensor([1]), changed)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


def test_positions_matter_in_one_dimension(model: Generator) -> None:
    """Rotary positions: equal codes at all places still give different logits at different places."""
    logits = model(torch.tensor([1]), torch.full((1, 6), 5))
    assert not torch.allclose(logits[0, 2], logits[0, 5], atol=1e-3)


def test_scale_one_is_conditional_only(model: Generator) -> None:
    classes = torch.tensor([0, 1, 2])
    plain = sample(model, classes, uniform(3), SampleConfig(cfg_scale=1.0))
    almost = sample(model, classes, uniform(3), SampleConfig(cfg_scale=1.0 + 1e-9))  # the guided path
    assert torch.equal(plain, almost)


def test_scale_zero_ignores_the_class(model: Generator) -> None:
    numbers = uniform(1).expand(4, -1)
    unconditional = sample(model, torch.tensor([0, 1, 2, 3]), numbers, SampleConfig(cfg_scale=0.0))
    assert (unconditional == unconditional[0]).all()


def test_guidance_follows_its_formula() -> None:
    cond, uncond = torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 1.0]])
    assert torch.equal(guide(cond, uncond, 2.5), torch.tensor([[2 + 2.5 * -1, 1 + 2.5 * 2]]))


def test_temperature_zero_takes_the_most_likely_code(model: Generator) -> None:
    codes = sample(model, torch.tensor([1]), uniform(1), SampleConfig(temperature=0))
    assert torch.equal(model(torch.tensor([1]), codes).argmax(-1), codes)


def reference_filter(logits: torch.Tensor, top_k: int, top_p: float) -> set[int]:
    """Codes kept, by a plain loop."""
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


@pytest.mark.parametrize("top_k", [0, 1, 3, 11, 50])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.7, 1.0])
def test_filters_equal_a_plain_loop(top_k: int, top_p: float) -> None:
    logits = torch.randn(8, 11, generator=torch.Generator().manual_seed(0)) * 2
    filtered = filter_logits(logits, top_k, top_p)
    for row, kept in zip(logits, filtered.isfinite(), strict=True):
        assert set(kept.nonzero()[:, 0].tolist()) == reference_filter(row, top_k, top_p)


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, -2.0, 0.5]])
    numbers = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    codes = draw(logits.expand(20_000, -1), numbers, SampleConfig(temperature=2.0))
    share = torch.bincount(codes, minlength=4) / 20_000
    assert torch.allclose(share, (logits[0] / 2).softmax(0), atol=1e-3)


def test_a_number_at_the_very_end_draws_a_possible_code() -> None:
    logits = torch.tensor([[1.0, 2.0, -torch.inf, -torch.inf]])
    almost_one = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert draw(logits, almost_one, SampleConfig()).item() == 1


def test_a_sample_does_not_depend_on_its_batch_mates(model: Generator) -> None:
    classes, numbers, config = torch.tensor([0, 1, 2, 0]), uniform(4), SampleConfig(cfg_scale=2.0)
    together = sample(model, classes, numbers, config)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(sample(model, classes[order], numbers[order], config), together[order])
