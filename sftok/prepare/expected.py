"""Count the images that a listing gives each split, before any of them is read."""

import math
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc

from sftok.config import DataConfig
from sftok.prepare.deal import equals, free, hashes_of
from sftok.sources.listing import Entries, Source, batches_of

FEW = 100_000  # entries; of more, splits by hash are as large as val_fraction says


class ExpectedSplit(NamedTuple):
    """Numbers of images by split, if all of them can be read."""

    train: int
    val: int
    classes: int
    fractions: tuple[float, ...] = ()
    """val_fraction from which 1, 2, 3 ... images are held out; empty if the source has splits of its own."""
    lone_class: str | None = None
    """a class all of whose images are held out by hash."""

    def fraction_for(self, count: int) -> float | None:
        """Return a val_fraction, of few digits, that holds out as many images; None if none leaves others."""
        if len(self.fractions) <= count:
            return None
        fraction = (math.floor(self.fractions[count - 1] * 1000) + 1) / 1000
        return fraction if fraction < self.fractions[-1] else None


def expected_split(source: Source, config: DataConfig) -> ExpectedSplit | None:
    """Return the sizes of splits as `prepare` will divide a listing; None for images in containers, or too many."""
    if source.containers or len(source.entries) > FEW:
        return None
    entries = Entries.join(batch.read() for batch in batches_of(source.entries))
    entries = Entries(entries.table.filter(pc.is_null(entries.column("problem"))))
    classes = len(source.class_names or ())
    is_val, is_free = equals(entries, "split", "val"), free(entries)
    if not is_free.any():
        return ExpectedSplit(int((~is_val).sum()), int(is_val.sum()), classes)
    draws = np.where(is_free, hashes_of(entries)[1], np.inf)
    held_out = is_val | (draws < config.val_fraction) | (draws == draws.min())  # the first by hash always
    labels = entries.column("class_name").to_pylist()
    by_split: dict[bool, set[str]] = {True: set(), False: set()}
    for label, is_held_out in zip(labels, held_out.tolist(), strict=True):
        by_split[is_held_out].add(label or "")
    lone = sorted(by_split[True] - by_split[False] - {""})
    fractions = tuple(np.sort(draws[is_free]).tolist())
    return ExpectedSplit(int((~held_out).sum()), int(held_out.sum()), classes, fractions, lone[0] if lone else None)
