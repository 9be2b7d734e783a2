"""Metrics of two sets of codes, summed over shards: agreement code by code, and drift of codebook use.

Shapes: n views in both datasets, N codes per view, K codebook size.
"""

from collections.abc import Set
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flows.store.diff.compare_rows import Pair
from infra.codes.contract import CodesInfo

Counts = NDArray[np.int64]


class Frequencies(NamedTuple):
    """Distribution of the codes of one dataset."""

    usage: float
    """share of the codebook that occurs, in [0, 1]."""
    entropy_bits: float
    perplexity: float


class Drift(NamedTuple):
    """Distances between two histograms over the same codebook."""

    js_divergence_bits: float
    """in [0, 1]."""
    js_distance: float
    """its square root, which is a metric."""
    total_variation: float
    """half the sum of absolute differences, in [0, 1]."""


class Agreement(NamedTuple):
    """Agreement of the views that are in both datasets, code by code."""

    codes: float
    """share of equal codes, in [0, 1]."""
    chance: float
    """expected share if codes were drawn from the histograms of their positions, independently of the image."""
    per_position: tuple[float, ...]
    views_all_equal: float
    images_all_equal: float
    worst: tuple[tuple[str, float], ...]
    """image ids with the share of equal codes over all views, lowest first."""


def frequencies(counts_K: Counts) -> Frequencies:
    """Compute usage, entropy and perplexity of a histogram; like `sftok.metrics.functional`, from summed counts."""
    shares = counts_K[counts_K > 0] / max(counts_K.sum(), 1)
    entropy = max(float(-(shares * np.log2(shares)).sum()), 0.0)
    return Frequencies(float((counts_K > 0).mean()), entropy, 2.0**entropy)


def drift(old_K: Counts, new_K: Counts) -> Drift:
    """Compute Jensen-Shannon divergence and distance, and total variation, of two histograms."""
    p, q = old_K / max(old_K.sum(), 1), new_K / max(new_K.sum(), 1)
    divergence = min(max(_relative_entropy(p, (p + q) / 2) / 2 + _relative_entropy(q, (p + q) / 2) / 2, 0.0), 1.0)
    return Drift(divergence, divergence**0.5, float(np.abs(p - q).sum() / 2))


def _relative_entropy(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    some = p > 0
    return float((p[some] * np.log2(p[some] / q[some])).sum())


class Tally:
    """Sums over pairs of shards."""

    def __init__(self, old: CodesInfo, new: CodesInfo, worst: int) -> None:
        self.old_NK = np.zeros((old.num_tokens, old.codebook_size), np.int64)
        self.new_NK = np.zeros((new.num_tokens, new.codebook_size), np.int64)
        self.images = {"both": 0, "only_before": 0, "only_after": 0}
        self.views = {"both": 0, "only_before": 0, "only_after": 0}
        self.equal_N = np.zeros(old.num_tokens, np.int64)
        self.whole = {"views": 0, "images": 0}
        self.shared = 0  # images with a view in both
        self.keep, self.worst = worst, list[tuple[float, str]]()

    def add(self, pair: Pair, *, is_compared: bool) -> None:
        """Add one pair of shards."""
        for rows, counts_NK in ((pair.old, self.old_NK), (pair.new, self.new_NK)):
            _count(rows.codes, counts_NK)
        keys = [{key: row for row, key in enumerate(zip(rows.image_id, rows.variant, strict=True))} for rows in pair]
        both = [key for key in keys[0] if key in keys[1]]
        _note(self.views, keys[0].keys(), keys[1].keys())
        _note(self.images, {image_id for image_id, _ in keys[0]}, {image_id for image_id, _ in keys[1]})
        if not is_compared or not both:
            return
        old, new = (np.array([place[key] for key in both]) for place in keys)
        equal_nN = pair.old.codes[old] == pair.new.codes[new]
        self.equal_N += equal_nN.sum(0)
        self.whole["views"] += int(equal_nN.all(1).sum())
        self._add_images([image_id for image_id, _ in both], equal_nN)

    def agreement(self) -> Agreement | None:
        """Return the shares over all pairs; None if no view is in both datasets."""
        if not self.views["both"]:
            return None
        p_NK = self.old_NK / self.old_NK.sum(1, keepdims=True)
        q_NK = self.new_NK / self.new_NK.sum(1, keepdims=True)
        per_position_N = self.equal_N / self.views["both"]
        return Agreement(
            codes=float(per_position_N.mean()),
            chance=float((p_NK * q_NK).sum(1).mean()),
            per_position=tuple(per_position_N.tolist()),
            views_all_equal=self.whole["views"] / self.views["both"],
            images_all_equal=self.whole["images"] / self.shared,
            worst=tuple((image_id, share) for share, image_id in self.worst),
        )

    def _add_images(self, image_ids: list[str], equal_nN: NDArray[np.bool_]) -> None:
        place = {image_id: row for row, image_id in enumerate(dict.fromkeys(image_ids))}
        index_n = np.array([place[image_id] for image_id in image_ids])
        share = np.bincount(index_n, equal_nN.mean(1)) / np.bincount(index_n)
        self.shared += len(place)
        self.whole["images"] += int((np.bincount(index_n, equal_nN.all(1)) == np.bincount(index_n)).sum())
        self.worst = sorted([*self.worst, *zip(share.tolist(), place, strict=True)])[: self.keep]


def _count(codes_nN: NDArray[np.integer[Any]], counts_NK: Counts) -> None:
    positions, size = counts_NK.shape
    for position in range(positions):
        counts_NK[position] += np.bincount(codes_nN[:, position], minlength=size)


def _note(counts: dict[str, int], old: Set[Any], new: Set[Any]) -> None:
    both = len(old & new)
    counts["both"] += both
    counts["only_before"] += len(old) - both
    counts["only_after"] += len(new) - both
