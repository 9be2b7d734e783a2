"""Convolutions of the Inception network on CPUs: weights laid out for oneDNN once, the ReLU fused into the product.

The counterpart of `F.conv2d` in `prepared.FoldedConv`, by private operators of torch, which are used where
`infra.compute.packed.can_pack` says so.

Shapes: B images, C channels, h x w the grid of a level.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class PackedConv:
    """A convolution whose weights are in the layout that oneDNN prefers for the shape of its input."""

    def __init__(self, weight: Tensor, bias: Tensor, stride: Sequence[int], padding: Sequence[int]) -> None:
        self.weight, self.bias, self.geometry = weight, bias, (list(padding), list(stride), [1, 1], 1)
        self.packed_for: torch.Size | None = None

    def __call__(self, x_BChw: Tensor, *, relu: bool) -> Tensor:
        """(B, C, h, w) in the weights' type, channels last."""
        if self.packed_for != x_BChw.shape:
            # The best layout depends on the input's shape: given another one, oneDNN moves all weights in every call.
            self.weight = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *self.geometry, x_BChw.shape)
            self.packed_for = x_BChw.shape
        act = "relu" if relu else "none"
        y: Tensor = torch.ops.mkldnn._convolution_pointwise(x_BChw, self.weight, self.bias, *self.geometry, act, [], "")
        return y
