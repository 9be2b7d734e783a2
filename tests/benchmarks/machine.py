"""Peak rates of this machine: matrix products, to be timed in turns with the work that is compared with them."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from infra.compute.packed import PackedLinear
from sftok.model.prepared import DTYPES, PRECISIONS, InferencePrecision

THREADS = 2
SIDE = 2048
ROWS, INPUTS, OUTPUTS = 2568, 768, 3072  # the widest layer of SFTok-B at batch 8


class Peak(NamedTuple):
    """GFLOP/s of matrix products in one precision."""

    plain: float
    """a large square product by `torch.mm`, which is what a plain program meets."""
    packed: float
    """a linear layer of SFTok-B through weights laid out for oneDNN."""

    @property
    def best(self) -> float:
        """The faster of the two."""
        return max(self)


def products() -> dict[str, Callable[[], object]]:
    """The products by name, to be handed to `seconds` together with what is measured."""
    found: dict[str, Callable[[], object]] = {}
    for precision in PRECISIONS:
        dtype = DTYPES[precision]
        a, b, x = (torch.randn(shape, dtype=dtype) for shape in ((SIDE, SIDE), (SIDE, SIDE), (ROWS, INPUTS)))
        layer = PackedLinear(torch.randn(OUTPUTS, INPUTS), None, dtype)
        found[f"{precision} plain"] = lambda a=a, b=b: a @ b
        found[f"{precision} packed"] = lambda x=x, layer=layer: layer(x)
    return found


def peak(precision: InferencePrecision, taken: Mapping[str, float]) -> Peak:
    """Compute the peak rates from the times of the products."""
    plain, packed = (
        2 * SIDE**3 / taken[f"{precision} plain"],
        2 * ROWS * INPUTS * OUTPUTS / taken[f"{precision} packed"],
    )
    return Peak(plain / 1e9, packed / 1e9)
