"""The transformer for inference, with weights cast to a type once, as on CUDA; for CPUs see `cpu`.

As under autocast, products are computed in that type, norms and the residual stream in float32. A bfloat16 residual
stream would save memory bandwidth and double the error of SFTok-B's latent tokens: with a codebook as dense as 1,792 of
its own outputs, 91 % of the codes would equal those of float32, instead of 97 %.

A block does not add its last output to the residual stream: it hands it to the next block, which adds it. So where
blocks are compiled one by one, this addition and the norm after it are one pass over memory, as in a graph of the whole
network, and all blocks share one graph.

Shapes: B images, S sequence positions, W width, H heads, Q queries.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infra.compute.compiler import check_compiler, keep_compiled
from infra.compute.regions import compile_regions
from sftok.model.transformer import Block, Transformer, attend, split_heads


class CastLinear(nn.Module):
    """A frozen copy of a linear layer, or of some of its outputs, in another type."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, outputs: slice = slice(None)) -> None:
        super().__init__()
        self.register_buffer("weight", linear.weight.detach()[outputs].to(dtype, copy=True))
        self.register_buffer(
            "bias", None if linear.bias is None else linear.bias.detach()[outputs].to(dtype, copy=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) in the weights' type to (..., outputs)."""
        return F.linear(x, self.weight, self.bias)


class CastNorm(nn.Module):
    """A frozen layer norm in float32, whose output is cast to a type."""

    weight: Tensor
    bias: Tensor

    def __init__(self, norm: nn.LayerNorm, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.shape, self.epsilon = dtype, norm.normalized_shape, norm.eps
        self.register_buffer("weight", norm.weight.detach().to(torch.float32, copy=True))
        self.register_buffer("bias", norm.bias.detach().to(torch.float32, copy=True))

    def forward(self, x: Tensor) -> Tensor:
        """(..., W) float32 to (..., W)."""
        return F.layer_norm(x, self.shape, self.weight, self.bias, self.epsilon).to(self.dtype)


class CastBlock(nn.Module):
    """A frozen transformer block; the output of its second half is not added to the residual stream."""

    def __init__(self, block: Block, dtype: torch.dtype, *, is_last: bool) -> None:
        super().__init__()
        qkv, self.heads = block.attention.qkv, block.attention.heads
        width = qkv.in_features
        # The last block has queries at the kept positions only, so they get a layer of their own.
        parts = (slice(width), slice(width, None)) if is_last else (slice(None),)
        self.projections = nn.ModuleList(CastLinear(qkv, dtype, part) for part in parts)
        self.norm_1, self.norm_2 = CastNorm(block.norm_1, dtype), CastNorm(block.norm_2, dtype)
        self.out = CastLinear(block.attention.out, dtype)
        self.expand, self.contract = CastLinear(block.mlp.expand, dtype), CastLinear(block.mlp.contract, dtype)

    def forward(self, x_BSW: Tensor, added_BSW: Tensor | None, keep: slice | None = None) -> tuple[Tensor, Tensor]:
        """Residual stream, float32, and the output yet to be added to it, to the same two, at `keep` if it is given."""
        if added_BSW is not None:
            x_BSW = x_BSW + added_BSW
        normed_BSW = self.norm_1(x_BSW)
        if keep is None:
            q_BHQD, k_BHSD, v_BHSD = split_heads(self.projections[0](normed_BSW), 3, self.heads)
        else:
            (q_BHQD,) = split_heads(self.projections[0](normed_BSW[:, keep]), 1, self.heads)
            k_BHSD, v_BHSD = split_heads(self.projections[1](normed_BSW), 2, self.heads)
            x_BSW = x_BSW[:, keep]
        x_BSW = x_BSW + self.out(attend(q_BHQD, k_BHSD, v_BHSD))
        return x_BSW, self.contract(F.gelu(self.expand(self.norm_2(x_BSW))))


class CastTransformer:
    """Norm, blocks, norm; holds the weights as they were when it was made."""

    def __init__(self, transformer: Transformer, dtype: torch.dtype, *, compile: bool = False) -> None:
        """Cast the weights, and with `compile` compile the blocks, for one batch size at a time.

        Raises:
            ValueError: a compiler is missing.
        """
        *body, last = (block for block in transformer.blocks if isinstance(block, Block))
        self.norm_in = CastNorm(transformer.norm_in, torch.float32)
        self.norm_out = CastNorm(transformer.norm_out, torch.float32)
        self.body = [CastBlock(block, dtype, is_last=False) for block in body]
        self.last = CastBlock(last, dtype, is_last=True)
        if compile:
            keep_compiled()
            check_compiler(transformer.norm_in.weight.device)
            compile_regions(nn.ModuleList([*self.body, self.last]), repeatable=True)

    def __call__(self, x_BSW: Tensor, keep: slice) -> Tensor:
        """(B, S, W) float32 to the positions `keep`, (B, keep, W) float32."""
        x_BSW, added_BSW = self.norm_in(x_BSW), None
        for block in self.body:
            x_BSW, added_BSW = block(x_BSW, added_BSW)
        x_BSW, added_BSW = self.last(x_BSW, added_BSW, keep)
        return self.norm_out(x_BSW + added_BSW)
