"""The autoregressive generator: a class-conditional decoder-only transformer over the codes of an image.

RMSNorm, SwiGLU, one-dimensional rotary positions (latent tokens lie on no grid), and a class token with a null class
for guidance. The input is [class, code 1, ..., code N-1]; the outputs are the logits of codes 1 to N. With annealed
orders, a code keeps the rotary angle of its own position, and a learned embedding of the position to predict is added
to every input. Logits and codes are in the dataset's layout whatever the order.

Shapes: B sequences, S positions, N codes per sequence, V codebook size, W width, H heads, D channels per head.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generator.code_space import CodeSpace
from generator.config import AnnealedOrder, FixedOrder, GeneratorConfig
from generator.dropout import drop
from generator.key_value_cache import Cache, check_cache
from generator.network import GeneratorNetwork
from generator.orders import draw_orders, fixed_order, inverse

ROTARY_BASE = 10_000.0
NORM_EPSILON = 1e-6


class StepPosition(NamedTuple):
    """Position of a cached step, with its rotary angles and mask."""

    position: Tensor
    """scalar int64."""
    cos: Tensor
    sin: Tensor
    """(1, D) each."""
    unseen: Tensor
    """(N,), true where the cache has not been written yet."""


def rotate(x_BHSD: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
    """Rotate the two halves of D by the positions' angles, in float32; the result has the type of the input."""
    first, second = x_BHSD.chunk(2, dim=-1)
    return (x_BHSD * cos_SD + torch.cat([-second, first], dim=-1) * sin_SD).to(x_BHSD.dtype)


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions and, optionally, normalised queries and keys."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        head_dim = config.width // config.heads
        self.q_norm = nn.RMSNorm(head_dim, NORM_EPSILON) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head_dim, NORM_EPSILON) if config.qk_norm else nn.Identity()

    def project(self, x_BSW: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project to queries, keys and values, (B, H, S, D) each, and apply rotary positions."""
        q, k, v = self.qkv(x_BSW).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotate(self.q_norm(q), cos_SD, sin_SD), rotate(self.k_norm(k), cos_SD, sin_SD)
        return q.to(v.dtype), k.to(v.dtype), v

    def forward(self, x_BSW: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
        """Attend at all positions at once, (B, S, W) to (B, S, W)."""
        q, k, v = self.project(x_BSW, cos_SD, sin_SD)
        y_BHSD = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y_BHSD.transpose(1, 2).flatten(2))

    def step(self, x_B1W: Tensor, at: StepPosition, keys_BHND: Tensor, values_BHND: Tensor) -> Tensor:
        """Attend at one position, writing its keys and values into the cache."""
        q, k, v = self.project(x_B1W, at.cos, at.sin)
        where = at.position[None]
        keys_BHND.index_copy_(2, where, k)
        values_BHND.index_copy_(2, where, v)
        # Written out, since for one query two products and a softmax, fused by the compiler, beat the fused kernel.
        scores_BH1N = (q * q.shape[-1] ** -0.5) @ keys_BHND.transpose(-1, -2)
        share_BH1N = scores_BH1N.float().masked_fill(at.unseen, -torch.inf).softmax(-1).to(v.dtype)
        return self.out((share_BH1N @ values_BHND).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU feed-forward layer."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.width, 2 * config.ffn_width, bias=False)
        self.down = nn.Linear(config.ffn_width, config.width, bias=False)

    def forward(self, x_BSW: Tensor) -> Tensor:
        """Map (B, S, W) to (B, S, W)."""
        gate, up = self.gate_up(x_BSW).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.RMSNorm(config.width, NORM_EPSILON), nn.RMSNorm(config.width, NORM_EPSILON)
        self.attention, self.feed_forward = Attention(config), FeedForward(config)
        self.dropout = config.dropout

    def forward(
        self,
        x_BSW: Tensor,
        cos_SD: Tensor,
        sin_SD: Tensor,
        lines: Tensor | None = None,
        constants_W: Tensor | None = None,
    ) -> Tensor:
        """Map (B, S, W) to (B, S, W); residuals are dropped from by their lines (2, 2, B, S), if there are any."""
        y_BSW = self.attention(self.norm_1(x_BSW), cos_SD, sin_SD)
        if lines is None or constants_W is None:
            x_BSW = x_BSW + y_BSW
            return x_BSW + self.feed_forward(self.norm_2(x_BSW))
        x_BSW = x_BSW + drop(y_BSW, lines[0], constants_W, self.dropout)
        return x_BSW + drop(self.feed_forward(self.norm_2(x_BSW)), lines[1], constants_W, self.dropout)

    def step(self, x_B1W: Tensor, at: StepPosition, keys_BHND: Tensor, values_BHND: Tensor) -> Tensor:
        """Compute one position with the layer's cache."""
        x_B1W = x_B1W + self.attention.step(self.norm_1(x_B1W), at, keys_BHND, values_BHND)
        return x_B1W + self.feed_forward(self.norm_2(x_B1W))


class Generator(GeneratorNetwork):
    """Class-conditional autoregressive model of code sequences."""

    config: GeneratorConfig
    places_per_block = 2
    cos: Tensor
    sin: Tensor
    order: Tensor

    def __init__(self, config: GeneratorConfig, space: CodeSpace) -> None:
        super().__init__(config, space)
        self.class_embed = nn.Embedding(space.num_classes + 1, config.width)
        self.code_embed = nn.Embedding(space.codebook_size, config.width)
        is_annealed = config.order.kind == "annealed"
        self.target_positions = nn.Embedding(space.num_tokens, config.width) if is_annealed else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm_out = nn.RMSNorm(config.width, NORM_EPSILON)
        self.head = None if config.tied else nn.Linear(config.width, space.codebook_size, bias=False)
        self.place_tables()

    def place_tables(self) -> None:
        """Compute the buffers that are not learned, in float32 whatever the type of the weights."""
        device, dim = self.code_embed.weight.device, self.config.width // self.config.heads
        frequency = ROTARY_BASE ** (-torch.arange(0, dim, 2, device=device) / dim)
        # The class has angle 0, the code at position p angle p + 1: one more than the natural order needs.
        angle_SD = (torch.arange(self.space.num_tokens + 1, device=device)[:, None] * frequency).repeat(1, 2)
        self.register_buffer("cos", angle_SD.cos(), persistent=False)
        self.register_buffer("sin", angle_SD.sin(), persistent=False)
        order, count = self.config.order, self.space.num_tokens
        order_N = fixed_order(order, count) if isinstance(order, FixedOrder) else torch.arange(count)
        self.register_buffer("order", order_N.to(device), persistent=False)

    def initialise(self) -> None:
        """Initialise the weights.

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

    def draw_view(self, batch: int, *, step: int, generator: torch.Generator) -> Tensor | None:
        """Draw the orders of a training batch, (B, N); None unless orders are annealed."""
        order = self.config.order
        if not isinstance(order, AnnealedOrder):
            return None
        return draw_orders(order, batch, self.space.num_tokens, step=step, generator=generator)

    def training_loss(
        self,
        class_B: Tensor,
        codes_BN: Tensor,
        view_BN: Tensor | None,
        keys_B: Tensor | None = None,
        *,
        label_smoothing: float,
    ) -> Tensor:
        """Return the mean cross-entropy of every code given those before it in its order."""
        logits_BNV = self(class_B, codes_BN, view_BN, keys_B)
        return F.cross_entropy(logits_BNV.float().flatten(0, 1), codes_BN.flatten(), label_smoothing=label_smoothing)

    def draw_targets(self, codes_BN: Tensor, generator: torch.Generator) -> Tensor:  # noqa: ARG002  # nothing to draw
        """Choose the codes to predict in validation, (B, N) bool: all of them."""
        return torch.ones_like(codes_BN, dtype=torch.bool)

    def predict(self, class_B: Tensor, codes_BN: Tensor, targets_BN: Tensor) -> Tensor:  # noqa: ARG002  # all of them
        """Return logits (B, N, V) of every code given those before it."""
        return self(class_B, codes_BN)

    def forward(
        self, class_B: Tensor, codes_BN: Tensor, order_BN: Tensor | None = None, keys_B: Tensor | None = None
    ) -> Tensor:
        """Return logits of every code given those before it in the order, (B, N, V) in the dataset's layout.

        Args:
            class_B: class ids in [0, num_classes].
            codes_BN: codes in the dataset's layout.
            order_BN: from `draw_orders`, for annealed orders only; None is the config's fixed order or the natural one.
            keys_B: of the rows' dropout, in training; None: nothing is dropped.

        Raises:
            ValueError: the number of codes is wrong, or an order is given but the config's orders are not annealed.
        """
        self.check_length(codes_BN)
        if order_BN is not None and self.target_positions is None:
            raise ValueError(f"order_BN is given, but order.kind = {self.config.order.kind!r}: make it 'annealed'")
        order = self.order if order_BN is None else order_BN
        is_natural = order_BN is None and self.config.order.kind != "fixed"
        ordered_BN = codes_BN if is_natural else codes_BN.gather(1, order.expand_as(codes_BN))
        x_BNW = torch.cat([self.class_embed(class_B)[:, None], self.code_embed(ordered_BN[:, :-1])], dim=1)
        if self.target_positions is not None:
            x_BNW = x_BNW + self.target_positions(order)
        masks = self.masks(keys_B)
        x_BNW = self.through_blocks(self.drop_input(x_BNW, masks), *self._angles(order_BN), masks=masks)
        if not is_natural:  # back to the dataset's layout before the head: hidden states are narrower than logits
            x_BNW = x_BNW.gather(1, inverse(order).expand(len(x_BNW), -1)[..., None].expand_as(x_BNW))
        return self.logits(x_BNW)

    def _angles(self, order_BN: Tensor | None) -> tuple[Tensor, Tensor]:
        """Look up cosines and sines of the inputs' own positions, (S, D) or (B, 1, S, D)."""
        if order_BN is None:
            return self.cos[:-1], self.sin[:-1]
        own_BS = F.pad(order_BN[:, :-1] + 1, (1, 0))
        return self.cos[own_BS][:, None], self.sin[own_BS][:, None]

    def logits(self, x_BNW: Tensor) -> Tensor:
        """Map the blocks' output to logits, (..., W) to (..., V)."""
        head = self.code_embed.weight if self.head is None else self.head.weight
        return F.linear(self.norm_out(x_BNW), head)

    def empty_cache(self, batch: int) -> Cache:
        """Allocate a cache for `batch` sequences."""
        shape = (batch, self.config.heads, self.space.num_tokens, self.cos.shape[-1])
        return Cache.empty(shape, self.config.layers, like=self.code_embed.weight)

    def step(self, x_BW: Tensor, position: Tensor, cache: Cache) -> Tensor:
        """Return logits (B, V) of the code at `position` of the order; shapes do not depend on the position.

        Args:
            x_BW: embedding of the class at position 0, then of the last code.
            position: scalar int64, from 0.
            cache: from `empty_cache`; written at `position`.

        Raises:
            ValueError: the cache has other sizes.
        """
        check_cache(cache, len(x_BW), self.space.num_tokens)
        unseen_N = torch.arange(self.space.num_tokens, device=x_BW.device) > position
        # Indexing with `position` itself would synchronize the host, and no CUDA graph could be captured.
        cos, sin = (table.index_select(0, position[None]) for table in (self.cos, self.sin))
        at = StepPosition(position, cos, sin, unseen_N)
        if self.target_positions is not None:
            x_BW = x_BW + self.target_positions(position)
        x_B1W = x_BW[:, None]
        for block, keys_BHND, values_BHND in zip(self.blocks, *cache, strict=True):
            assert isinstance(block, Block)
            x_B1W = block.step(x_B1W, at, keys_BHND, values_BHND)
        return self.logits(x_B1W)[:, 0]
