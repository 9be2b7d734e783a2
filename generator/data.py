"""Code Parquet as training batches: a pure function of the step, like the images of the tokenizer.

Shapes: B sequences, N codes a sequence.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from generator.space import CodeSpace
from infra.codes import CodeRows, CodesInfo
from infra.training import seed_of


class CodeBatch(NamedTuple):
    """What a training step sees."""

    classes: Tensor
    """(B,) int64; the null class where the label is dropped or missing."""
    codes: Tensor
    """(B, N) int64."""


@dataclass(frozen=True)
class CodeData:
    """All rows of a split in memory."""

    classes: Tensor
    """(rows,) int64, -1 where there is no label."""
    codes: Tensor
    """(rows, N), kept narrow until a batch is drawn."""

    @classmethod
    def of(cls, rows: CodeRows) -> "CodeData":
        """Take over the arrays of `read_codes`."""
        return cls(torch.from_numpy(rows.class_id).long(), torch.from_numpy(rows.codes))


def space_of(info: CodesInfo) -> CodeSpace:
    """Vocabulary, length and classes as the dataset states them; no classes where it has no labels."""
    return CodeSpace(info.codebook_size, info.num_tokens, len(info.class_names or ()))


class TrainCodes:
    """Training batches: every row once an epoch, variants mixed, order and dropped labels drawn from the seed."""

    def __init__(self, data: CodeData, space: CodeSpace, *, seed: int, batch_size: int, class_dropout: float) -> None:
        if not len(data.codes):
            raise ValueError("the code dataset has no training rows")
        self.data, self.space, self.seed, self.batch_size = data, space, seed, batch_size
        self.class_dropout = class_dropout
        self._epoch, self._order = -1, torch.empty(0)

    def batch(self, step: int) -> CodeBatch:
        """The batch of `step` (from 0); batches run across the borders of epochs."""
        rows = torch.tensor([self._row(step * self.batch_size + i) for i in range(self.batch_size)])
        generator = torch.Generator().manual_seed(seed_of(self.seed, "class_dropout", step))
        is_dropped = torch.rand(self.batch_size, generator=generator) < self.class_dropout
        classes = with_null(self.data.classes[rows], self.space).masked_fill(is_dropped, self.space.null_class)
        return CodeBatch(classes, self.data.codes[rows].long())

    def _row(self, position: int) -> int:
        epoch, place = divmod(position, len(self.data.codes))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(seed_of(self.seed, "epoch", epoch))
            self._epoch, self._order = epoch, torch.randperm(len(self.data.codes), generator=generator)
        return int(self._order[place])


def with_null(classes_B: Tensor, space: CodeSpace) -> Tensor:
    """Class ids with -1 (no label) as the null class."""
    return torch.where(classes_B < 0, space.null_class, classes_B)
