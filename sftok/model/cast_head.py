"""The decoder's head for inference, with weights cast to a type once; for CPUs see `cpu`.

Shapes: B images, P proxy positions, W width, V proxy codes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sftok.model.cast_transformer import CastLinear


class CastHead:
    """Linear layer, tanh, linear layer; products in the given type, logits in float32.

    bfloat16 logits tie by the hundred, and ties decide which positions stay. It is enough to leave the sums of the last
    product unrounded: on an H200, float32 products run at a fifteenth of the rate of bfloat16.
    """

    def __init__(self, hidden: nn.Linear, logits: nn.Linear, dtype: torch.dtype) -> None:
        self.dtype, self.hidden = dtype, CastLinear(hidden, dtype)
        self.weight_VW = logits.weight.detach().to(dtype, copy=True)
        self.bias_V = logits.bias.detach().to(torch.float32, copy=True)

    def __call__(self, y_BPW: Tensor) -> Tensor:
        """(B, P, W) float32 to logits (B, P, V) float32."""
        hidden_BPW = self.hidden(y_BPW.to(self.dtype)).float().tanh_().to(self.dtype)
        sums = unrounded_product(hidden_BPW.flatten(0, 1), self.weight_VW)
        return sums.add_(self.bias_V).unflatten(0, y_BPW.shape[:2])


def unrounded_product(x_NW: Tensor, weight_VW: Tensor) -> Tensor:
    """Multiply two matrices of one type to (N, V) float32, the type in which bfloat16 products are summed anyway."""
    if x_NW.dtype == torch.float32:
        return F.linear(x_NW, weight_VW)
    if x_NW.is_cuda:
        return torch.mm(x_NW, weight_VW.T, out_dtype=torch.float32)
    return F.linear(x_NW.float(), weight_VW.float())
