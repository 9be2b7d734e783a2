"""Token orders: how they are drawn and annealed; codes and logits stay in the dataset's layout."""

import pytest
import torch
from torch import Tensor

from generator.autoregressive import Generator
from generator.config import AnnealedOrder, FixedOrder, GeneratorConfig
from generator.orders import draw_orders, fixed_order, inverse, random_share
from tests.support.small_generators import SPACE, autoregressive

ANNEALED = AnnealedOrder(start_step=10, end_step=30)
RANDOM = {"kind": "annealed", "start_step": 1, "end_step": 2}


def orders(batch: int, step: int, seed: int = 0) -> Tensor:
    return draw_orders(ANNEALED, batch, 6, step=step, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("step", "share"), [(0, 1.0), (10, 1.0), (20, 0.5), (25, 0.25), (30, 0.0), (99, 0.0)])
def test_the_share_of_random_orders_falls_linearly(step: int, share: float) -> None:
    assert random_share(ANNEALED, step) == pytest.approx(share)
    is_natural = (orders(4000, step) == torch.arange(6)).all(1).float().mean().item()
    assert is_natural == pytest.approx(1 - share + share / 720, abs=0.03)  # one of 6! random ones is natural


def test_every_order_has_every_position_once_and_the_seed_decides() -> None:
    drawn = orders(50, 0)
    assert torch.equal(drawn.sort(1).values, torch.arange(6).expand(50, -1))
    assert torch.equal(drawn, orders(50, 0))
    assert not torch.equal(drawn, orders(50, 0, seed=1))
    assert torch.equal(drawn.gather(1, inverse(drawn)), torch.arange(6).expand(50, -1))


def test_an_annealing_that_begins_where_it_ends_is_a_step() -> None:
    sudden = AnnealedOrder(start_step=5, end_step=5)
    assert [random_share(sudden, step) for step in (4, 5)] == [1.0, 0.0]


def test_fixed_orders_depend_on_the_seed_alone() -> None:
    first = fixed_order(FixedOrder(seed=1), 32)
    torch.manual_seed(99)
    assert torch.equal(first, fixed_order(FixedOrder(seed=1), 32))
    assert not torch.equal(first, fixed_order(FixedOrder(seed=2), 32))
    assert torch.equal(first.sort().values, torch.arange(32))


def seen(model: Generator, codes: Tensor, order: Tensor | None) -> Tensor:
    """Return (target, source), true if the target's logits depend on the source code."""
    classes = torch.tensor([1])
    before, rows = model(classes, codes, order), []
    for source in range(6):
        changed = codes.clone()
        changed[0, source] = (codes[0, source] + 1) % 11
        rows.append((model(classes, changed, order) != before).any(-1)[0])
    return torch.stack(rows, dim=1)


def test_a_code_sees_exactly_those_before_it_in_the_order() -> None:
    codes = torch.randint(11, (1, 6), generator=torch.Generator().manual_seed(0))
    order = torch.tensor([[3, 0, 5, 1, 4, 2]])
    when = inverse(order)[0]
    wanted = when[:, None] > when[None]
    assert torch.equal(seen(autoregressive(order=RANDOM), codes, order), wanted)
    fixed = autoregressive(order={"kind": "fixed", "seed": 3})
    when = inverse(fixed.order)
    assert torch.equal(seen(fixed, codes, None), when[:, None] > when[None])


def test_logits_depend_on_which_position_is_asked_for() -> None:
    """Target-aware positions: after the same codes, another next position has other logits."""
    model, codes = autoregressive(order=RANDOM), torch.randint(11, (1, 6))
    first, second = torch.tensor([[2, 4, 0, 1, 3, 5]]), torch.tensor([[2, 5, 0, 1, 3, 4]])
    one, other = model(torch.tensor([1]), codes, first), model(torch.tensor([1]), codes, second)
    assert torch.equal(one[0, 2], other[0, 2])
    assert not torch.allclose(one[0, 4], other[0, 5], atol=1e-3)


def test_the_natural_order_is_what_no_order_means() -> None:
    model, codes = autoregressive(order=RANDOM), torch.randint(11, (3, 6))
    natural = torch.arange(6).expand(3, -1)
    assert torch.allclose(model(torch.tensor([0, 1, 3]), codes, natural), model(torch.tensor([0, 1, 3]), codes))


def test_orders_of_a_batch_are_each_sequences_own() -> None:
    model, codes, drawn = autoregressive(order=RANDOM), torch.randint(11, (4, 6)), orders(4, 0)
    classes = torch.tensor([0, 1, 2, 3])
    together = model(classes, codes, drawn)
    for row in range(4):
        alone = model(classes[row : row + 1], codes[row : row + 1], drawn[row : row + 1])
        assert torch.allclose(together[row : row + 1], alone, atol=1e-5)


def test_a_fixed_order_is_the_natural_one_of_reordered_codes() -> None:
    fixed, natural = autoregressive(order={"kind": "fixed", "seed": 3}), autoregressive()
    codes, classes = torch.randint(11, (2, 6)), torch.tensor([0, 3])
    wanted = natural(classes, codes[:, fixed.order])
    assert torch.allclose(fixed(classes, codes)[:, fixed.order], wanted, atol=1e-6)


def test_a_model_without_random_orders_refuses_one() -> None:
    with pytest.raises(ValueError, match=r"order.kind = 'natural'"):
        autoregressive()(torch.tensor([0]), torch.zeros(1, 6, dtype=torch.long), torch.arange(6)[None])


def test_an_annealing_that_ends_before_it_starts_is_refused() -> None:
    with pytest.raises(ValueError, match=r"end_step = 3 is before start_step = 5"):
        AnnealedOrder(start_step=5, end_step=3)


def test_a_config_states_its_order() -> None:
    config = GeneratorConfig.model_validate({"order": RANDOM})
    assert GeneratorConfig.model_validate(config.as_json()) == config
    assert Generator(GeneratorConfig(), SPACE._replace(num_tokens=4)).target_positions is None
