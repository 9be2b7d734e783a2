"""The autoregressive generator: a decoder-only transformer from a class to the codes of an image.

RMSNorm, SwiGLU, rotary positions in one dimension (latent tokens lie on no grid), a class token with a null class for
guidance. The sequence is [class, code 1, ..., code N-1]; its outputs are the logits of codes 1 to N.

Shapes: B sequences, S positions, N codes a sequence, V codebook size, W width, H heads, D channels a head.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generator.config import GeneratorConfig

ROTARY_BASE = 10_000.0
NORM_EPSILON = 1e-6


class CodeSpace(NamedTuple):
    """What the codes of a dataset are like."""

    codebook_size: int
    num_tokens: int
    num_classes: int

    @property
    def null_class(self) -> int:
        """The class id that stands for no class."""
        return self.num_classes


class Cache(NamedTuple):
    """Keys and values of all positions seen so far, of static size."""

    keys: Tensor
    """(layers, B, H, N, D)."""
    values: Tensor
    """(layers, B, H, N, D)."""


def rotate(x_BHSD: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
    """Turn the two halves of D by the positions' angles."""
    first, second = x_BHSD.chunk(2, dim=-1)
    return x_BHSD * cos_SD + torch.cat([-second, first], dim=-1) * sin_SD


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions and, where asked for, normalised queries and keys."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        head_dim = config.width // config.heads
        self.q_norm = nn.RMSNorm(head_dim, NORM_EPSILON) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head_dim, NORM_EPSILON) if config.qk_norm else nn.Identity()

    def project(self, x_BSW: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (B, H, S, D) each, positions applied."""
        q, k, v = self.qkv(x_BSW).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return rotate(self.q_norm(q), cos_SD, sin_SD), rotate(self.k_norm(k), cos_SD, sin_SD), v

    def forward(self, x_BSW: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
        """All positions at once, (B, S, W) to (B, S, W)."""
        q, k, v = self.project(x_BSW, cos_SD, sin_SD)
        y_BHSD = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y_BHSD.transpose(1, 2).flatten(2))

    def step(self, x_B1W: Tensor, cos_1D: Tensor, sin_1D: Tensor, past: tuple[Tensor, Tensor], position: int) -> Tensor:
        """One position; `past` are this layer's keys and values (B, H, N, D), written at `position`."""
        q, k, v = self.project(x_B1W, cos_1D, sin_1D)
        keys, values = past
        keys[:, :, position], values[:, :, position] = k[:, :, 0], v[:, :, 0]
        y_BH1D = F.scaled_dot_product_attention(q, keys[:, :, : position + 1], values[:, :, : position + 1])
        return self.out(y_BH1D.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.width, 2 * config.ffn_width, bias=False)
        self.down = nn.Linear(config.ffn_width, config.width, bias=False)

    def forward(self, x_BSW: Tensor) -> Tensor:
        """(B, S, W) to (B, S, W)."""
        gate, up = self.gate_up(x_BSW).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.RMSNorm(config.width, NORM_EPSILON), nn.RMSNorm(config.width, NORM_EPSILON)
        self.attention, self.feed_forward = Attention(config), FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BSW: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
        """(B, S, W) to (B, S, W)."""
        x_BSW = x_BSW + self.dropout(self.attention(self.norm_1(x_BSW), cos_SD, sin_SD))
        return x_BSW + self.dropout(self.feed_forward(self.norm_2(x_BSW)))

    def step(self, x_B1W: Tensor, cos_1D: Tensor, sin_1D: Tensor, past: tuple[Tensor, Tensor], position: int) -> Tensor:
        """One position with the layer's cache."""
        x_B1W = x_B1W + self.attention.step(self.norm_1(x_B1W), cos_1D, sin_1D, past, position)
        return x_B1W + self.feed_forward(self.norm_2(x_B1W))


class Generator(nn.Module):
    """Class-conditional autoregressive model of a code sequence."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: GeneratorConfig, space: CodeSpace) -> None:
        super().__init__()
        self.config, self.space = config, space
        self.class_embed = nn.Embedding(space.num_classes + 1, config.width)
        self.code_embed = nn.Embedding(space.codebook_size, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm_out = nn.RMSNorm(config.width, NORM_EPSILON)
        self.head = nn.Linear(config.width, space.codebook_size, bias=False)
        self._place_rotary()

    def _place_rotary(self) -> None:
        dim = self.config.width // self.config.heads
        frequency = ROTARY_BASE ** (-torch.arange(0, dim, 2) / dim)
        angle_ND = (torch.arange(self.space.num_tokens)[:, None] * frequency).repeat(1, 2)
        self.register_buffer("cos", angle_ND.cos(), persistent=False)
        self.register_buffer("sin", angle_ND.sin(), persistent=False)

    def initialise(self) -> None:
        """Fill the weights.

        | what | how |
        |---|---|
        | linear, embedding | normal, std 0.02 |
        | last layer of attention and feed-forward | normal, std 0.02 / sqrt(2 layers) |
        | norm | weight 1 |
        """
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                nn.init.ones_(parameter)
                continue
            is_last = name.endswith(("out.weight", "down.weight"))
            nn.init.normal_(parameter, std=0.02 / (2 * self.config.layers) ** 0.5 if is_last else 0.02)

    def forward(self, class_B: Tensor, codes_BN: Tensor) -> Tensor:
        """Class ids (B,) and codes (B, N) to the logits of every code given those before it, (B, N, V)."""
        x_BNW = torch.cat([self.class_embed(class_B)[:, None], self.code_embed(codes_BN[:, :-1])], dim=1)
        x_BNW = self.dropout(x_BNW)
        for block in self.blocks:
            x_BNW = block(x_BNW, self.cos, self.sin)
        return self.head(self.norm_out(x_BNW))

    def empty_cache(self, batch: int) -> Cache:
        """Room for the keys and values of `batch` sequences."""
        shape = (self.config.layers, batch, self.config.heads, self.space.num_tokens, self.cos.shape[-1])
        like = self.head.weight
        return Cache(like.new_zeros(shape), like.new_zeros(shape))

    def step(self, x_BW: Tensor, position: int, cache: Cache) -> Tensor:
        """Logits (B, V) of the code after `position`; x (B, W) embeds the class, or from position 1 the last code."""
        cos_1D, sin_1D, x_B1W = self.cos[position : position + 1], self.sin[position : position + 1], x_BW[:, None]
        for i, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            x_B1W = block.step(x_B1W, cos_1D, sin_1D, (cache.keys[i], cache.values[i]), position)
        return self.head(self.norm_out(x_B1W))[:, 0]
