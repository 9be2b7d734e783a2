"""The multi-step decoder: masks in training, and what iterative decoding may and may not change."""

import math

import pytest
import torch

from sftok.model.decoder import random_mask
from sftok.model.iterative_decoding import decode_steps
from tests.support.tiny_tokenizer import tokenizer

MASK, POSITIONS, CODES = 32, 16, 32


def first(batch: int) -> torch.Tensor:
    return torch.full((batch, POSITIONS), MASK)


def recorder(seen: list[torch.Tensor]) -> object:
    """A decoder of fixed random logits that notes what it was given."""
    logits = torch.randn(8, POSITIONS, CODES, generator=torch.Generator().manual_seed(0))

    def decode(ids: torch.Tensor, z_q: torch.Tensor) -> torch.Tensor:
        seen.append(ids.clone())
        return logits[: len(ids)] + 0.1 * len(seen)

    return decode


@pytest.mark.parametrize("num_steps", [2, 4, 8])
def test_given_positions_never_change(num_steps: int) -> None:
    seen: list[torch.Tensor] = []
    ids, _ = decode_steps(recorder(seen), first(3), torch.zeros(3, 8, 8), num_steps=num_steps)
    for before, after in zip(seen, [*seen[1:], ids], strict=True):
        given = before != MASK
        assert torch.equal(before[given], after[given])
    assert (ids != MASK).all()


def test_the_number_hidden_follows_the_schedule() -> None:
    seen: list[torch.Tensor] = []
    decode_steps(recorder(seen), first(3), torch.zeros(3, 8, 8), num_steps=8)
    wanted = [POSITIONS] + [math.floor(POSITIONS * math.acos((s + 1) / 8) / (math.pi / 2)) for s in range(7)]
    assert [set((ids == MASK).sum(1).tolist()) for ids in seen] == [{n} for n in wanted]


def test_the_published_counts_for_256_positions() -> None:
    """method.md 1.4: 235, 214, 193, 170, 145, 117, 82 for eight steps."""
    seen: list[torch.Tensor] = []

    def decode(ids: torch.Tensor, z_q: torch.Tensor) -> torch.Tensor:
        seen.append(ids)
        return torch.randn(1, 256, 4, generator=torch.Generator().manual_seed(0))

    decode_steps(decode, torch.full((1, 256), 4), torch.zeros(1, 1, 1), num_steps=8)
    assert [(ids == 4).sum().item() for ids in seen[1:]] == [235, 214, 193, 170, 145, 117, 82]


def test_ties_do_not_hide_more_than_planned() -> None:
    """Guards against the published threshold, which hides every position that ties with the last one."""
    seen: list[torch.Tensor] = []

    def decode(ids: torch.Tensor, z_q: torch.Tensor) -> torch.Tensor:
        seen.append(ids)
        return torch.zeros(2, POSITIONS, CODES)

    decode_steps(decode, first(2), torch.zeros(2, 8, 8), num_steps=4)
    assert (seen[1] == MASK).sum(1).tolist() == [math.floor(POSITIONS * math.acos(0.25) / (math.pi / 2))] * 2


def test_noise_of_an_image_does_not_depend_on_its_batch() -> None:
    model = tokenizer()
    z_q = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(2))

    def run(rows: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return decode_steps(
                model.decoder, first(len(rows)), z_q[rows], num_steps=4, temperature=3.0, keys_B=torch.tensor(rows)
            )[0]

    assert torch.equal(run([0, 1, 2, 3])[[3, 1]], run([3, 1]))
    assert not torch.equal(run([0]), decode_steps(model.decoder, first(1), z_q[:1], num_steps=4)[0])


def test_noise_without_keys_is_refused() -> None:
    with pytest.raises(ValueError, match=r"temperature = 1\.0"):
        decode_steps(recorder([]), first(1), torch.zeros(1, 8, 8), num_steps=2, temperature=1.0)


def test_training_masks_hide_the_share_that_the_schedule_draws() -> None:
    hidden = random_mask(torch.Size([4000, 64]), torch.Generator().manual_seed(0))
    # E[arccos(t) / (pi / 2)] over t uniform is 2 / pi.
    assert hidden.float().mean().item() == pytest.approx(2 / math.pi, abs=0.02)
    assert hidden.float().mean(0).std() < 0.02  # no position is preferred
