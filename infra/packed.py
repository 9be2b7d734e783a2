"""Linear layers on CPUs whose weights are laid out for oneDNN once, instead of in every product."""

import torch
import torch.nn.functional as F
from torch import Tensor


class PackedLinear:
    """A linear layer on a CPU; input and output in the weights' type."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.dtype, self.weight = dtype, weight.detach().to(dtype)
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.is_packed = torch.backends.mkldnn.is_available() and (
            dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        )
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
