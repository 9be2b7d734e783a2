"""The transformer and the decoder's head on CPUs: linear layers whose weights are laid out for oneDNN once.

The counterpart of `cast_transformer` and `cast_head`, which compute the same numbers with torch's own layers. It is 2.3
times as fast as `F.linear` in float32, with the GELU or the residual added within the product: eager operations fused
like this reach what compiled ones do, and cost a tiny job nothing. Where weights cannot be packed,
`infra.compute.packed.PackedLinear` calls torch's own products.

Shapes: B images, S sequence positions, P proxy positions, V proxy codes, W width, H heads, Q queries, D channels per
head.
"""

import torch
from torch import Tensor, nn

from infra.compute.packed import PackedLinear
from sftok.model.transformer import Block, Transformer, attend, split_heads


def pack(linear: nn.Linear, dtype: torch.dtype) -> PackedLinear:
    """Pack a linear layer's weights for oneDNN."""
    return PackedLinear(linear.weight, linear.bias, dtype)


class PackedBlock:
    """A transformer block; as under autocast, norms and the residual stream stay in float32."""

    def __init__(self, block: Block, dtype: torch.dtype, *, is_last: bool) -> None:
        self.norm_1, self.norm_2, self.dtype = block.norm_1, block.norm_2, dtype
        self.heads, qkv = block.attention.heads, block.attention.qkv
        # The last block has queries at the kept positions only, so they get a layer of their own.
        parts = (1, 2) if is_last else (3,)
        rows = [part * qkv.in_features for part in parts]
        weights, biases = qkv.weight.split(rows), qkv.bias.split(rows)
        self.projections = [
            (part, PackedLinear(w, b, dtype)) for part, w, b in zip(parts, weights, biases, strict=True)
        ]
        self.out = pack(block.attention.out, dtype)
        self.expand, self.contract = pack(block.mlp.expand, dtype), pack(block.mlp.contract, dtype)

    def __call__(self, x_BSW: Tensor, keep: slice | None = None) -> Tensor:
        """(B, S, W) float32 to the positions `keep` (None: all), (B, keep, W)."""
        normed_BSW = self.norm_1(x_BSW).to(self.dtype)
        inputs = [normed_BSW] if keep is None else [normed_BSW[:, keep], normed_BSW]
        heads = [
            head
            for (parts, project), x in zip(self.projections, inputs, strict=True)
            for head in split_heads(project(x), parts, self.heads)
        ]
        q_BHQD, k_BHSD, v_BHSD = heads
        y = self.out.plus(attend(q_BHQD, k_BHSD, v_BHSD), x_BSW if keep is None else x_BSW[:, keep])
        return self.contract.plus(self.expand.gelu(self.norm_2(y).to(self.dtype)), y)


class PackedTransformer:
    """Norm, blocks, norm; holds the weights as they were when it was made, and the norms themselves."""

    def __init__(self, transformer: Transformer, dtype: torch.dtype) -> None:
        self.norm_in, self.norm_out = transformer.norm_in, transformer.norm_out
        *body, last = (block for block in transformer.blocks if isinstance(block, Block))
        self.body = [PackedBlock(block, dtype, is_last=False) for block in body]
        self.last = PackedBlock(last, dtype, is_last=True)

    def __call__(self, x_BSW: Tensor, keep: slice) -> Tensor:
        """(B, S, W) float32 to the positions `keep`, (B, keep, W)."""
        x_BSW = self.norm_in(x_BSW)
        for block in self.body:
            x_BSW = block(x_BSW)
        return self.norm_out(self.last(x_BSW, keep))


class PackedHead:
    """Linear layer, tanh, linear layer; the last product in float32 whatever the type.

    bfloat16 logits tie by the hundred, and ties decide which positions stay.
    """

    def __init__(self, hidden: nn.Linear, logits: nn.Linear, dtype: torch.dtype) -> None:
        self.dtype, self.hidden, self.logits = dtype, pack(hidden, dtype), pack(logits, torch.float32)

    def __call__(self, y_BPW: Tensor) -> Tensor:
        """(B, P, W) float32 to logits (B, P, V) float32."""
        return self.logits(self.hidden(y_BPW.to(self.dtype)).float().tanh_())
