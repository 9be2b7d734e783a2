"""Training batches from code Parquet: a pure function of the step, like the tokenizer's batches of images.

Shapes: B sequences, N codes per sequence.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from generator.code_space import CodeSpace
from infra.codes.contract import CodeArrays, CodeRows, CodesInfo
from infra.compute.transfer import send
from infra.training.loop import seed_of

RESIDENT = 8 * 2**30  # bytes; larger datasets are not kept on the training GPU
_SIGNED = {torch.uint16: (torch.int16, 0xFFFF), torch.uint32: (torch.int32, 0xFFFFFFFF)}


class CodeBatch(NamedTuple):
    """Batch of a training step."""

    classes: Tensor
    """(B,) int64; the null class if the label is dropped or missing."""
    codes: Tensor
    """(B, N) int64."""


@dataclass(frozen=True)
class CodeData:
    """All rows of a split in memory."""

    classes: Tensor
    """(rows,) any integer type, -1 for no label."""
    codes: Tensor
    """(rows, N), in the file's integer type until a batch is drawn."""

    @classmethod
    def of(cls, rows: CodeRows | CodeArrays) -> "CodeData":
        """Wrap arrays without a copy: ranks may share their memory."""
        return cls(torch.from_numpy(rows.class_id), torch.from_numpy(rows.codes))


def space_of(info: CodesInfo) -> CodeSpace:
    """Return the code space that a dataset's info states; no classes if it has no labels."""
    return CodeSpace(info.codebook_size, info.num_tokens, len(info.class_names or ()))


def check_rows(data: CodeData, space: CodeSpace, split: str) -> None:
    """Check that a generator can learn from these rows, before training starts.

    Raises:
        ValueError: codes have another length or codebook, class ids are out of range, or no row of a dataset with
            classes has a label.
    """
    codes, classes = data.codes.numpy(), data.classes.numpy()
    if codes.ndim != 2 or codes.shape[1] != space.num_tokens or len(codes) != len(classes):
        raise ValueError(
            f"{split} codes: shape {codes.shape} and {len(classes)} class ids, not (rows, {space.num_tokens}) and one "
            "each: pass the result of load_codes"
        )
    if not len(codes):
        return
    if (wrong := codes.min()) < 0 or (wrong := codes.max()) >= space.codebook_size:
        raise ValueError(
            f"{split} codes: code {wrong} is not in [0, {space.codebook_size}): they are from another codebook, "
            "encode again"
        )
    if (wrong := classes.min()) < -1 or (wrong := classes.max()) >= space.num_classes:
        raise ValueError(
            f"{split} codes: class id {wrong} is not among {space.num_classes} classes (-1: none): encode again"
        )
    if space.num_classes and classes.max() < 0:
        raise ValueError(
            f"{split} codes: no row has a label, but class_names has {space.num_classes}: a generator would learn no "
            "class; encode labelled images, or omit class_names for a generator without classes"
        )


class TrainCodes:
    """Training batches: every row once per epoch, variants mixed, order and dropped labels drawn from the seed.

    Unless the dataset is too large, a GPU holds all rows and gathers batches itself; only row indices are sent.
    """

    def __init__(
        self,
        data: CodeData,
        space: CodeSpace,
        *,
        seed: int,
        batch_size: int,
        class_dropout: float,
        device: torch.device | str = "cpu",
    ) -> None:
        if not len(data.codes):
            raise ValueError("the code dataset has no training rows")
        size = sum(tensor.numel() * tensor.element_size() for tensor in (data.classes, data.codes))
        self._home = device if size <= RESIDENT else "cpu"
        # Not every device can gather unsigned integers, so their bits are stored as signed ones.
        signed, self._bits = _SIGNED.get(data.codes.dtype, (data.codes.dtype, 0))
        self._classes, self._codes = data.classes.to(self._home), data.codes.view(signed).to(self._home)
        self.space, self.seed, self.batch_size, self.device = space, seed, batch_size, device
        self.class_dropout = class_dropout
        self._epoch, self._order = -1, torch.empty(0)

    def batch(self, step: int) -> CodeBatch:
        """Return the batch of `step` (from 0), on the device; batches may span two epochs."""
        rows = send(self._rows(step * self.batch_size, self.batch_size), self._home)
        generator = torch.Generator().manual_seed(seed_of(self.seed, "class_dropout", step))
        is_dropped = torch.rand(self.batch_size, generator=generator) < self.class_dropout
        classes, codes = self._classes[rows], self._codes[rows].long()
        if self._bits:
            codes &= self._bits
        if self._home != self.device:
            classes, codes = send(classes, self.device), send(codes, self.device)
        classes = with_null(classes, self.space).masked_fill(send(is_dropped, self.device), self.space.null_class)
        return CodeBatch(classes, codes)

    def _rows(self, first: int, count: int) -> Tensor:
        """Return `count` row indices from position `first` of the endless sequence of epochs."""
        parts, last = [], first + count
        while first < last:
            epoch, place = divmod(first, len(self._codes))
            parts.append(self._epoch_order(epoch)[place : place + last - first])
            first += len(parts[-1])
        return torch.cat(parts).long()

    def _epoch_order(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(seed_of(self.seed, "epoch", epoch))
            self._epoch, self._order = epoch, torch.randperm(len(self._codes), generator=generator).int()
        return self._order


def with_null(classes_B: Tensor, space: CodeSpace) -> Tensor:
    """Convert class ids to int64, with -1 (no label) as the null class."""
    return torch.where(classes_B < 0, space.null_class, classes_B.long())
