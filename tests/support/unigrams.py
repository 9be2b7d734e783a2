"""What codes are like to a model that knows class and position, and nothing of the other codes."""

import numpy as np

from infra.codes.contract import CodeArrays, CodeRows

PRIOR = 0.1  # of every code, so that none that was not seen is impossible


def unigram_nll(train: CodeArrays | CodeRows, held_out: CodeArrays | CodeRows, codebook_size: int) -> float:
    """Mean nats a held-out code under the frequencies of training codes of its class and position.

    With as many training rows as codes that are in use, this is the per-position, per-class entropy and a little more.
    """
    total = 0.0
    for class_id in np.unique(held_out.class_id):
        seen, asked = (data.codes[data.class_id == class_id] for data in (train, held_out))
        for place in range(asked.shape[1]):
            count = np.bincount(seen[:, place], minlength=codebook_size) + PRIOR
            total -= np.log(count[asked[:, place]] / count.sum()).sum()
    return float(total / held_out.codes.size)


def unigram_entropy(data: CodeArrays | CodeRows, codebook_size: int) -> float:
    """Mean entropy in nats of the codes of a class at a position, by their frequencies: too low where rows are few."""
    entropies, rows = [], []
    for class_id in np.unique(data.class_id):
        codes = data.codes[data.class_id == class_id]
        for place in range(codes.shape[1]):
            share = np.bincount(codes[:, place], minlength=codebook_size) / len(codes)
            share = share[share > 0]
            entropies.append(-(share * np.log(share)).sum())
            rows.append(len(codes))
    return float(np.average(entropies, weights=rows))
