"""Linear layers on CPUs with weights packed for oneDNN once, instead of in every product."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor


def can_pack(dtype: torch.dtype) -> bool:
    """Tell whether oneDNN can pack and multiply weights of this type on this CPU.

    bfloat16 works with AVX-512, with the conversion instructions of late AVX2, and on arm64 CPUs that support it;
    elsewhere torch's own products are used. They are used, too, where a row's product would depend on its place among
    the rows, as with oneDNN 3.10 (torch 2.11) on AVX2: codes would depend on an image's place in its batch.
    """
    return torch.backends.mkldnn.is_available() and _multiplies(dtype) and _keeps_rows(dtype)


@functools.cache
def _multiplies(dtype: torch.dtype) -> bool:
    """Try a small layer: builds of torch differ in their operations, and CPUs in the types they support."""
    layer = torch.ones(8, 8, dtype=dtype)
    try:
        weight = torch.ops.mkldnn._reorder_linear_weight(layer)
        torch.ops.mkldnn._linear_pointwise(layer, weight, None, "none", [], "")
    except (AttributeError, RuntimeError):  # no such operation, or not for this type
        return False
    return True


@functools.cache
def _keeps_rows(dtype: torch.dtype) -> bool:
    """Try layers whose rows do not fill the last block of rows: the same rows, moved, have the same products."""
    generator = torch.Generator().manual_seed(0)
    for rows, inputs, outputs in ((40, 64, 64), (136, 16, 48), (160, 96, 288), (200, 64, 192)):
        x = torch.randn(rows, inputs, generator=generator).to(dtype)
        weight = torch.ops.mkldnn._reorder_linear_weight(torch.randn(outputs, inputs, generator=generator).to(dtype))
        here, moved = (
            torch.ops.mkldnn._linear_pointwise(each, weight, None, "none", [], "") for each in (x, x.roll(7, 0))
        )
        if not torch.equal(here.roll(7, 0), moved):
            return False
    return True


class PackedLinear:
    """A linear layer on a CPU with packed weights, if they can be packed; input and output have the weights' type."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.dtype, self.weight = dtype, weight.detach().to(dtype)
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.is_packed = can_pack(dtype)
        if self.is_packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight)

    def __call__(self, x: Tensor) -> Tensor:
        """Map (..., inputs) to (..., outputs)."""
        if not self.is_packed:
            return F.linear(x, self.weight, self.bias)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return y

    def gelu(self, x: Tensor) -> Tensor:
        """Return the exact GELU of the output."""
        if not self.is_packed:
            return F.gelu(self(x))
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "gelu", [], "none")
        return y

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """Return the output added to `residual`, in the type of `residual`."""
        if not self.is_packed or residual.dtype != x.dtype:
            return residual + self(x)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, residual, self.weight, self.bias, "add")
        return y
