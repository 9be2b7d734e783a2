"""Find the nearest reference of each query while references stream past once; memory is independent of their number.

Distances of uint8 images are exact: squares are summed as integers, which float64 holds, in any order and on any
device. On CUDA, float64 products use the tensor cores of GPUs that support it (A100, H100, H200).

Legend: N queries, R references, D values each.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sftok.metrics.functional import Images

# Largest block of float64 rows that is compared at once, in bytes and in rows. On CUDA two blocks of a gigabyte and
# their squares are in memory, 682 images of 256 x 256 each, besides the queries.
_BLOCK_BYTES = {"cpu": 1 << 26, "cuda": 1 << 30}
_BLOCK_ROWS = {"cpu": 1024, "cuda": 4096}


class NearestResult(NamedTuple):
    """The nearest reference of each query: distances (N) float64 and indices (N) int64."""

    distances: Tensor
    indices: Tensor


class NearestSearch:
    """Takes references in batches and keeps the nearest one of each query, without waiting for the device."""

    def __init__(self, queries: Sequence[Tensor], device: torch.device | str = "cpu") -> None:
        """Search for several sets of queries of one shape, uint8 images or rows of floats, on a device."""
        kind = torch.device(device).type
        self.device = torch.device(device) if kind in _BLOCK_BYTES else torch.device("cpu")  # others lack float64
        self.queries = [some.to(self.device) for some in queries]
        self._squares = [self.queries[0].new_full((len(some),), torch.inf, dtype=torch.float64) for some in queries]
        self._indices = [torch.zeros(len(some), dtype=torch.int64, device=self.device) for some in queries]
        size = max(1, queries[0].shape[1:].numel())
        self.rows = max(1, min(_BLOCK_ROWS[self.device.type], _BLOCK_BYTES[self.device.type] // (8 * size)))
        self._waiting: list[Tensor] = []
        self._seen = 0

    def add(self, references: Tensor) -> None:
        """Compare more references with all queries; references are numbered in the order of the calls.

        Raises:
            ValueError: they have another shape than the queries.
        """
        for some in self.queries:
            if some.shape[1:] != references.shape[1:]:
                raise ValueError(f"cannot look for {tuple(some.shape[1:])} among references {tuple(references.shape)}")
        self._waiting += [references] if len(references) else []
        while sum(map(len, self._waiting)) >= self.rows:
            self._compare(self.rows)

    def found(self) -> list[NearestResult]:
        """Return the nearest of all references so far, on the CPU.

        Raises:
            ValueError: there were none.
        """
        while self._waiting:
            self._compare(self.rows)
        if not self._seen:
            raise ValueError(f"cannot look for {tuple(self.queries[0].shape[1:])} among no references")
        return [
            NearestResult((smallest.sqrt() / (255.0 if some.dtype == torch.uint8 else 1.0)).cpu(), index.cpu())
            for some, smallest, index in zip(self.queries, self._squares, self._indices, strict=True)
        ]

    def _compare(self, rows: int) -> None:
        """Compare one block of the waiting references."""
        waiting = self._waiting[0] if len(self._waiting) == 1 else torch.cat(self._waiting)
        self._waiting = [waiting[rows:]] if len(waiting) > rows else []
        block = waiting[:rows].to(self.device).flatten(1).double()
        for some, smallest, index in zip(self.queries, self._squares, self._indices, strict=True):
            for at in range(0, len(some), self.rows):
                part = slice(at, at + self.rows)
                found, which = _nearest(some[part].flatten(1).double(), block)
                index[part] = torch.where(found < smallest[part], which + self._seen, index[part])
                smallest[part] = torch.minimum(found, smallest[part])
        self._seen += len(block)


def nearest_distances(queries: Sequence[Tensor], references: Images, device: str = "cpu") -> list[NearestResult]:
    """Find the nearest reference of each query of several sets by Euclidean distance, in one pass over the references.

    uint8 images are compared on the scale [0, 1].
    """
    search = NearestSearch(queries, device)
    if len(references):
        for batch in references.split(search.rows):
            search.add(batch)
    return search.found()


def _nearest(queries_ND: Tensor, references_RD: Tensor) -> tuple[Tensor, Tensor]:
    """Find the nearest reference of each query: squared distance and index, of equal ones the first."""
    norms = queries_ND.square().sum(1, keepdim=True) + references_RD.square().sum(1)
    smallest, index = (norms - 2 * queries_ND @ references_RD.T).min(1)
    return smallest.clamp(min=0), index
