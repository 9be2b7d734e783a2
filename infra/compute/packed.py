"""Linear layers on CPUs whose weights are laid out for oneDNN once, instead of in every product."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor


def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN lays out and multiplies weights of a type on this CPU.

    Of bfloat16 it does with AVX-512, with the conversions of late AVX2, and on arm64 that has it; elsewhere torch's own
    products are what there is.
    """
    return torch.backends.mkldnn.is_available() and _multiplies(dtype)


@functools.cache
def _multiplies(dtype: torch.dtype) -> bool:
    """Try a small layer: builds of torch differ in the operations that they have, and CPUs in the types."""
    layer = torch.ones(8, 8, dtype=dtype)
    try:
        weight = torch.ops.mkldnn._reorder_linear_weight(layer)
        torch.ops.mkldnn._linear_pointwise(layer, weight, None, "none", [], "")
    except (AttributeError, RuntimeError):  # no such operation, or none of this type
        return False
    return True


class PackedLinear:
    """A linear layer on a CPU; input and output in the weights' type, which are laid out where that can be done."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.dtype, self.weight = dtype, weight.detach().to(dtype)
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.is_packed = can_pack(dtype)
        if self.is_packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight)

    def __call__(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        if not self.is_packed:
            return F.linear(x, self.weight, self.bias)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return y

    def gelu(self, x: Tensor) -> Tensor:
        """The exact GELU of the output."""
        if not self.is_packed:
            return F.gelu(self(x))
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "gelu", [], "none")
        return y

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """The output added to `residual`, in the type of `residual`."""
        if not self.is_packed or residual.dtype != x.dtype:
            return residual + self(x)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, residual, self.weight, self.bias, "add")
        return y
