"""Unigram baseline: the held-out NLL per code of class-and-position frequencies, which a generator has to beat."""

import numpy as np
import torch
from torch import Tensor

from generator.code_space import CodeSpace
from generator.data import CodeData, with_null

WEIGHTS = tuple(4.0**power for power in range(-2, 7))
"""Candidate weights of the prior, in rows: how many rows of a class the position's overall frequencies count as."""


def frequency_nll(train: CodeData, held_out: CodeData, space: CodeSpace) -> Tensor:
    """Compute the NLL in nats per held-out code under training frequencies of its class and position, (N,) float64.

    A class's frequencies are smoothed with those of all classes, and these by one additional count for every code
    (Dirichlet priors). The prior's weight, the same at all positions, is the one that fits the held-out codes best, so
    the baseline is as strong as such a model can be, and slightly optimistic because it has seen them.
    """
    class_T, class_M = (with_null(data.classes, space).numpy() for data in (train, held_out))
    rows_M = np.bincount(class_T, minlength=space.num_classes + 1)[class_M]
    nll_SN = np.empty((len(WEIGHTS), space.num_tokens))
    for place in range(space.num_tokens):
        codes_T, codes_M = train.codes[:, place].numpy(), held_out.codes[:, place].numpy()
        share_M = (np.bincount(codes_T, minlength=space.codebook_size)[codes_M] + 1) / (
            len(codes_T) + space.codebook_size
        )
        count_M = _counts(class_T, codes_T, class_M, codes_M, space)
        for i, weight in enumerate(WEIGHTS):
            nll_SN[i, place] = -np.log((count_M + weight * share_M) / (rows_M + weight)).mean()
    return torch.from_numpy(nll_SN[nll_SN.mean(1).argmin()])


def _counts(
    class_T: np.ndarray, codes_T: np.ndarray, class_M: np.ndarray, codes_M: np.ndarray, space: CodeSpace
) -> np.ndarray:
    """Count training rows with each held-out row's class and code, in a table of the held-out codes only."""
    asked, column_M = np.unique(codes_M, return_inverse=True)
    columns_V = np.full(space.codebook_size, len(asked))
    columns_V[asked] = np.arange(len(asked))
    width = len(asked) + 1
    table = np.bincount(class_T * width + columns_V[codes_T], minlength=(space.num_classes + 1) * width)
    return table[class_M * width + column_M]
