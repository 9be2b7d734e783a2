"""The unigram baseline, compared with a plain reference."""

import numpy as np
import pytest
import torch

from generator.code_space import CodeSpace
from generator.data import CodeData
from generator.frequencies import WEIGHTS, frequency_nll

SPACE = CodeSpace(codebook_size=7, num_tokens=3, num_classes=2)


def data(rows: int, seed: int, classes: int = 2, codes: int = 7) -> CodeData:
    random = np.random.default_rng(seed)
    labels = random.integers(-1, classes, rows).astype(np.int32)
    return CodeData(torch.from_numpy(labels), torch.from_numpy(random.integers(0, codes, (rows, 3)).astype(np.uint16)))


def reference(train: CodeData, held_out: CodeData, weight: float) -> np.ndarray:
    """Compute the baseline by loops."""
    nll = np.zeros(3)
    for label, codes in zip(held_out.classes.tolist(), held_out.codes.tolist(), strict=True):
        for place, code in enumerate(codes):
            column, of_class = train.codes[:, place].long(), train.classes == label
            everywhere = ((column == code).sum().item() + 1) / (len(column) + 7)
            here = (column[of_class] == code).sum().item()
            nll[place] -= np.log((here + weight * everywhere) / (of_class.sum().item() + weight))
    return nll / len(held_out.codes)


@pytest.mark.parametrize("codes", [7, 3])
def test_it_is_the_best_of_the_smoothed_frequencies(codes: int) -> None:
    """Holds also if held-out codes do not occur in training, or rows have no label."""
    train, held_out = data(60, 0, codes=codes), data(20, 1)
    wanted = min((reference(train, held_out, weight) for weight in WEIGHTS), key=np.mean)
    assert np.allclose(frequency_nll(train, held_out, SPACE), wanted)


def test_codes_that_class_and_position_decide_cost_next_to_nothing() -> None:
    labels = torch.arange(400, dtype=torch.int32) % 2
    codes = (labels[:, None] * 3 + torch.arange(3)).to(torch.uint16)
    found = frequency_nll(CodeData(labels, codes), CodeData(labels[:20], codes[:20]), SPACE)
    assert found.shape == (3,)
    assert found.max() < 0.01


def test_a_class_without_training_rows_is_held_against_all_classes() -> None:
    train = CodeData(torch.zeros(70, dtype=torch.int32), (torch.arange(210).view(70, 3) % 7).to(torch.uint16))
    held_out = CodeData(torch.ones(7, dtype=torch.int32), train.codes[:7])
    assert torch.allclose(frequency_nll(train, held_out, SPACE), torch.full((3,), np.log(7.0), dtype=torch.float64))
