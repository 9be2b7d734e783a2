"""The pre-norm transformer that the encoder and the decoder share (METHOD: transformer block).

Shapes: B images, S sequence positions, W width, H heads, D channels a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sftok.config import TransformerConfig


class Attention(nn.Module):
    """Full bidirectional multi-head attention, no mask and no dropout."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BSW: Tensor) -> Tensor:
        """(B, S, W) to (B, S, W)."""
        q_BHSD, k_BHSD, v_BHSD = self.qkv(x_BSW).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y_BHSD = F.scaled_dot_product_attention(q_BHSD, k_BHSD, v_BHSD)
        return self.out(y_BHSD.transpose(1, 2).flatten(2))


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

    def forward(self, x_BSW: Tensor) -> Tensor:
        """(B, S, W) to (B, S, W)."""
        x_BSW = x_BSW + self.attention(self.norm_1(x_BSW))
        return x_BSW + self.mlp(self.norm_2(x_BSW))


class Transformer(nn.Module):
    """Norm, blocks, norm."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm_in = nn.LayerNorm(config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.layers))
        self.norm_out = nn.LayerNorm(config.width)

    def forward(self, x_BSW: Tensor, keep: slice) -> Tensor:
        """(B, S, W) to the positions `keep`, (B, keep, W); the last norm sees no others."""
        x_BSW = self.norm_in(x_BSW)
        for block in self.blocks:
            x_BSW = block(x_BSW)
        return self.norm_out(x_BSW[:, keep])


def free_parameter(rows: int, width: int) -> nn.Parameter:
    """A learned (rows, width) table for positions, classes or latent tokens; filled by `initialise`."""
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
