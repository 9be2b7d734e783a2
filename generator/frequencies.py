"""What codes are like to a model of class and position alone: what a generator must beat to have learned more."""

import numpy as np
import torch
from torch import Tensor

from generator.code_space import CodeSpace
from generator.data import CodeData, with_null

WEIGHTS = tuple(4.0**power for power in range(-2, 7))
"""Rows that a position's frequencies count like, beside those of a class."""


def frequency_nll(train: CodeData, held_out: CodeData, space: CodeSpace) -> Tensor:
    """Nats a held-out code under the frequencies of training codes of its class and position, (N,) float64 a position.

    Frequencies of a class are mixed with those of all classes, and these with one more row of every code, as Dirichlet
    priors do it. How much they weigh is what suits the held-out codes best, the same at all positions: as well as such
    a model can do, and a little better than it could without having seen them.
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
    """How many training rows have a held-out row's class and code; a table of codes that are asked for."""
    asked, column_M = np.unique(codes_M, return_inverse=True)
    columns_V = np.full(space.codebook_size, len(asked))
    columns_V[asked] = np.arange(len(asked))
    width = len(asked) + 1
    table = np.bincount(class_T * width + columns_V[codes_T], minlength=(space.num_classes + 1) * width)
    return table[class_M * width + column_M]
