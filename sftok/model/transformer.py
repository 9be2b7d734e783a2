"""The pre-norm transformer that the encoder and the decoder share (method.md 1.1).

Shapes: B images, S sequence positions, Q queries, W width, H heads, D channels per head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sftok.config import TransformerConfig


def attend(q_BHQD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor) -> Tensor:
    """Compute full bidirectional attention of (B, H, Q, D) queries over S positions, (B, Q, H * D)."""
    if q_BHQD.device.type == "cpu" and q_BHQD.dtype == torch.bfloat16:
        # On CPUs the fused kernel runs bf16 at the speed of fp32; two plain products run at the speed of bf16.
        scores_BHQS = (q_BHQD * q_BHQD.shape[-1] ** -0.5) @ k_BHSD.transpose(-1, -2)
        y_BHQD = scores_BHQS.softmax(-1) @ v_BHSD
    else:
        y_BHQD = F.scaled_dot_product_attention(q_BHQD, k_BHSD, v_BHSD)
    return y_BHQD.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Full bidirectional multi-head attention, no mask and no dropout."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BSW: Tensor, keep: slice | None = None) -> Tensor:
        """(B, S, W) to the outputs at the positions `keep` (None: all), (B, keep, W)."""
        if keep is None:
            return self.out(attend(*split_heads(self.qkv(x_BSW), 3, self.heads)))
        width, weight, bias = x_BSW.shape[-1], self.qkv.weight, self.qkv.bias
        (q_BHQD,) = split_heads(F.linear(x_BSW[:, keep], weight[:width], bias[:width]), 1, self.heads)
        k_BHSD, v_BHSD = split_heads(F.linear(x_BSW, weight[width:], bias[width:]), 2, self.heads)
        return self.out(attend(q_BHQD, k_BHSD, v_BHSD))


def split_heads(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """Split (B, S, parts * H * D), such as concatenated queries, keys and values, into `parts` of (B, H, S, D)."""
    return x.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


class Mlp(nn.Module):
    """Two linear layers with an exact GELU, hidden width 4 W."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, x_BSW: Tensor) -> Tensor:
        """(B, S, W) to (B, S, W)."""
        return self.contract(F.gelu(self.expand(x_BSW)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm_2 = nn.LayerNorm(width)
        self.mlp = Mlp(width)

    def forward(self, x_BSW: Tensor, keep: slice | None = None) -> Tensor:
        """(B, S, W) to the positions `keep` (None: all), (B, keep, W); at others only keys and values are computed."""
        kept = x_BSW if keep is None else x_BSW[:, keep]
        kept = kept + self.attention(self.norm_1(x_BSW), keep)
        return kept + self.mlp(self.norm_2(kept))


class Transformer(nn.Module):
    """Norm, blocks, norm."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm_in = nn.LayerNorm(config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.layers))
        self.norm_out = nn.LayerNorm(config.width)
        self.recomputes = False

    def recompute(self, on: bool) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations; same gradients."""
        self.recomputes = on

    def forward(self, x_BSW: Tensor, keep: slice) -> Tensor:
        """(B, S, W) to the positions `keep`, (B, keep, W); the last block and norm compute no others."""
        x_BSW = self.norm_in(x_BSW)
        for block in self.blocks[:-1]:
            x_BSW = self._run(block, x_BSW, None)
        return self.norm_out(self._run(self.blocks[-1], x_BSW, keep))

    def _run(self, block: nn.Module, x_BSW: Tensor, keep: slice | None) -> Tensor:
        if self.recomputes and torch.is_grad_enabled():
            # Blocks draw no random numbers, so there is no generator state to restore.
            return checkpoint(block, x_BSW, keep, use_reentrant=False, preserve_rng_state=False)
        return block(x_BSW, keep)


def free_parameter(rows: int, width: int) -> nn.Parameter:
    """Make a learned (rows, width) table for positions, classes or latent tokens; `initialise` fills it."""
    return nn.Parameter(torch.empty(rows, width))


def initialise(module: nn.Module, std: float) -> None:
    """Initialise an encoder and decoder as the published code does.

    | what | how |
    |---|---|
    | linear, convolution, embedding | normal, `std` (published: 0.02), cut at +-2; bias 0 |
    | query-key-value projection | Xavier uniform (PyTorch's multi-head attention); bias 0 |
    | norm | weight 1, bias 0 |
    | free parameters (positions, class, latent tokens) | normal, std width ** -0.5 |
    """
    for child in module.modules():
        if isinstance(child, nn.Linear | nn.Conv2d | nn.Embedding):
            nn.init.trunc_normal_(child.weight, std=std)
        if isinstance(child, nn.Linear | nn.Conv2d) and child.bias is not None:
            nn.init.zeros_(child.bias)
        if isinstance(child, nn.LayerNorm):
            child.reset_parameters()
        for parameter in child.parameters(recurse=False):
            if not isinstance(child, nn.Linear | nn.Conv2d | nn.Embedding | nn.LayerNorm):
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    for child in module.modules():
        if isinstance(child, Attention):
            nn.init.xavier_uniform_(child.qkv.weight)
