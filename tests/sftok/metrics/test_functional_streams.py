"""Figures of references that come in batches are those of references in memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sftok.metrics import functional, nearest


def images(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 4, 4), generator=generator, dtype=torch.uint8)


class Uneven:
    """References of which every batch has another size, some of them none."""

    def __init__(self, rows: torch.Tensor, cuts: list[int]) -> None:
        self.rows, self.cuts, self.shape, self.asked = rows, cuts, rows.shape, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.rows[index]

    def split(self, size: int):
        self.asked += 1
        for part in torch.tensor_split(self.rows, sorted(cut % (len(self.rows) + 1) for cut in self.cuts)):
            yield from part.split(size) if len(part) else ()


@given(st.lists(st.integers(0, 60), max_size=6), st.integers(1, 50), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_nearest_is_exact_for_any_blocks(cuts, block, seed):
    references, queries = images(40, seed), [images(7, seed + 100), images(30, seed)[::3]]
    whole = [(q[:, None].double() - references[None].double()).square().flatten(2).sum(2) for q in queries]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(nearest._BLOCK_ROWS, "cpu", block)
        there = Uneven(references, cuts)
        found = nearest.nearest_distances(queries, there)
    assert there.asked == 1, "one pass for all queries"
    for one, squares in zip(found, whole, strict=True):
        assert torch.equal(one.distances, squares.min(1).values.sqrt() / 255)
        assert torch.equal(squares.gather(1, one.indices[:, None])[:, 0], squares.min(1).values)
    assert (found[1].distances == 0).all()
    assert torch.equal(found[1].indices, torch.arange(0, 30, 3))


def test_verbatim_rows_are_found_in_whichever_batch_they_are():
    training = torch.arange(60).reshape(20, 3)
    samples = torch.stack([training[4], training[19], training[4], training[0].flip(0)])
    others = torch.tensor([[0, 1, 2], [2, 1, 0]])
    shares = functional.verbatim_shares([samples, others], iter(training.split(6)))
    assert shares == [0.75, 0.5]
    assert functional.verbatim_shares([samples], iter(training[:4].split(6))) == [0]
    large = torch.tensor([[65_536 + 4, 70_000]])
    assert functional.verbatim_shares([large], [torch.tensor([[4, 4464]])]) == [0], (
        "codes above 16 bits keep their bits"
    )
    with pytest.raises(ValueError, match="cannot look for codes"):
        functional.verbatim_shares([samples], [training[:, :2]])


def test_counts_of_batches_add_up_to_those_of_all_codes():
    codes = torch.randint(0, 9, (50, 4), generator=torch.Generator().manual_seed(0))
    counts = sum((functional.code_counts(part, 12) for part in codes.split(7)), torch.zeros(12, dtype=torch.int64))
    assert torch.equal(counts, functional.code_counts(codes, 12))
    assert functional.codebook_usage(counts) == 0.75
    frequency = torch.unique(codes, return_counts=True)[1].double() / codes.numel()
    entropy = -(frequency * frequency.log2()).sum().item()
    assert functional.entropy_bits(counts) == pytest.approx(entropy, rel=1e-12)
    assert functional.perplexity(counts) == pytest.approx(2**entropy, rel=1e-12)
