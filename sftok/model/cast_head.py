"""The decoder's head for inference where the modules' own layers are fast: weights cast to a type once.

Shapes: B images, P proxy positions, W width, V proxy codes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sftok.model.cast_transformer import CastLinear


class CastHead:
    """Linear layer, tanh, linear layer; products in a type of their own, logits in float32.

    bfloat16 logits tie by the hundred, and ties decide which positions stay; but it is enough that the last product's
    sums are not rounded: on an H200 products of float32 run at a fifteenth of bfloat16's rate.
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
    """The product (N, V) of two matrices of one type in float32, in which sums of bfloat16 products are kept anyway."""
    if x_NW.dtype == torch.float32:
        return F.linear(x_NW, weight_VW)
    if x_NW.is_cuda:
        return torch.mm(x_NW, weight_VW.T, out_dtype=torch.float32)
    return F.linear(x_NW.float(), weight_VW.float())
