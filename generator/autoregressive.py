"""The autoregressive generator: a decoder-only transformer from a class to the codes of an image.

RMSNorm, SwiGLU, rotary positions in one dimension (latent tokens lie on no grid), a class token with a null class for
guidance. The sequence is [class, code 1, ..., code N-1]; its outputs are the logits of codes 1 to N. Where orders are
annealed, a code keeps the rotary angle of its own position, and every input is told by a learned vector which position
it is to predict. Logits and codes are in the dataset's layout whatever the order.

Shapes: B sequences, S positions, N codes a sequence, V codebook size, W width, H heads, D channels a head.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from generator.code_space import CodeSpace as CodeSpace
from generator.config import FixedOrder, GeneratorConfig
from generator.orders import fixed_order, inverse

ROTARY_BASE = 10_000.0
NORM_EPSILON = 1e-6


class Cache(NamedTuple):
    """Keys and values of all positions seen so far, of static size.

    A tensor a layer: of one for all of them, a compiled step copies the whole at each layer.
    """

    keys: tuple[Tensor, ...]
    """(B, H, N, D) a layer."""
    values: tuple[Tensor, ...]
    """(B, H, N, D) a layer."""


class Place(NamedTuple):
    """Where a cached step stands."""

    position: Tensor
    """scalar int64."""
    cos: Tensor
    sin: Tensor
    """(1, D) each."""
    unseen: Tensor
    """(N,), true where nothing has been written yet."""


def rotate(x_BHSD: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
    """Turn the two halves of D by the positions' angles, in float32; the result has the type of the input."""
    first, second = x_BHSD.chunk(2, dim=-1)
    return (x_BHSD * cos_SD + torch.cat([-second, first], dim=-1) * sin_SD).to(x_BHSD.dtype)


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
        q, k = rotate(self.q_norm(q), cos_SD, sin_SD), rotate(self.k_norm(k), cos_SD, sin_SD)
        return q.to(v.dtype), k.to(v.dtype), v

    def forward(self, x_BSW: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
        """All positions at once, (B, S, W) to (B, S, W)."""
        q, k, v = self.project(x_BSW, cos_SD, sin_SD)
        y_BHSD = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y_BHSD.transpose(1, 2).flatten(2))

    def step(self, x_B1W: Tensor, place: Place, keys_BHND: Tensor, values_BHND: Tensor) -> Tensor:
        """One position; its keys and values are written into the cache."""
        q, k, v = self.project(x_B1W, place.cos, place.sin)
        where = place.position[None]
        keys_BHND.index_copy_(2, where, k)
        values_BHND.index_copy_(2, where, v)
        # Written out: for one query, two products and a softmax fuse better than the fused kernel runs.
        scores_BH1N = (q * q.shape[-1] ** -0.5) @ keys_BHND.transpose(-1, -2)
        share_BH1N = scores_BH1N.float().masked_fill(place.unseen, -torch.inf).softmax(-1).to(v.dtype)
        return self.out((share_BH1N @ values_BHND).transpose(1, 2).flatten(2))


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

    def step(self, x_B1W: Tensor, place: Place, keys_BHND: Tensor, values_BHND: Tensor) -> Tensor:
        """One position with the layer's cache."""
        x_B1W = x_B1W + self.attention.step(self.norm_1(x_B1W), place, keys_BHND, values_BHND)
        return x_B1W + self.feed_forward(self.norm_2(x_B1W))


class Generator(nn.Module):
    """Class-conditional autoregressive model of a code sequence."""

    cos: Tensor
    sin: Tensor
    order: Tensor

    def __init__(self, config: GeneratorConfig, space: CodeSpace) -> None:
        super().__init__()
        self.config, self.space, self.recomputes = config, space, False
        self.class_embed = nn.Embedding(space.num_classes + 1, config.width)
        self.code_embed = nn.Embedding(space.codebook_size, config.width)
        is_annealed = config.order.kind == "annealed"
        self.target_positions = nn.Embedding(space.num_tokens, config.width) if is_annealed else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm_out = nn.RMSNorm(config.width, NORM_EPSILON)
        self.head = None if config.tied else nn.Linear(config.width, space.codebook_size, bias=False)
        self.place_tables()

    def place_tables(self) -> None:
        """Make what is computed and not learned: float32, whatever type the weights have been turned into."""
        device, dim = self.code_embed.weight.device, self.config.width // self.config.heads
        frequency = ROTARY_BASE ** (-torch.arange(0, dim, 2, device=device) / dim)
        # A code at position p has angle p + 1, the class 0: one more than a natural sequence needs.
        angle_SD = (torch.arange(self.space.num_tokens + 1, device=device)[:, None] * frequency).repeat(1, 2)
        self.register_buffer("cos", angle_SD.cos(), persistent=False)
        self.register_buffer("sin", angle_SD.sin(), persistent=False)
        order, count = self.config.order, self.space.num_tokens
        order_N = fixed_order(order, count) if isinstance(order, FixedOrder) else torch.arange(count)
        self.register_buffer("order", order_N.to(device), persistent=False)

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

    def recompute(self, on: bool) -> None:
        """Whether the backward pass computes blocks again instead of keeping what they hold; same gradients."""
        self.recomputes = on

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.code_embed.weight.device

    def forward(self, class_B: Tensor, codes_BN: Tensor, order_BN: Tensor | None = None) -> Tensor:
        """Logits of every code given those before it in the order, (B, N, V) in the dataset's layout.

        Args:
            class_B: class ids in [0, num_classes].
            codes_BN: codes in the dataset's layout.
            order_BN: from `draw_orders`, for annealed orders only; without it the natural order.

        Raises:
            ValueError: codes of another length, or an order where the config has none.
        """
        if codes_BN.shape[1] != self.space.num_tokens:
            raise ValueError(f"{codes_BN.shape[1]} codes a sequence, but the generator has {self.space.num_tokens}")
        if order_BN is not None and self.target_positions is None:
            raise ValueError(f"order_BN is given, but order.kind = {self.config.order.kind!r}: make it 'annealed'")
        order = self.order if order_BN is None else order_BN
        is_natural = order_BN is None and self.config.order.kind != "fixed"
        seen_BN = codes_BN if is_natural else codes_BN.gather(1, order.expand_as(codes_BN))
        x_BNW = torch.cat([self.class_embed(class_B)[:, None], self.code_embed(seen_BN[:, :-1])], dim=1)
        if self.target_positions is not None:
            x_BNW = x_BNW + self.target_positions(order)
        cos, sin = self._angles(order_BN)
        x_BNW = self.dropout(x_BNW)
        for block in self.blocks:
            if self.recomputes and torch.is_grad_enabled():
                x_BNW = checkpoint(block, x_BNW, cos, sin, use_reentrant=False)
            else:
                x_BNW = block(x_BNW, cos, sin)
        if not is_natural:  # hidden states are put back, which are narrower than logits
            x_BNW = x_BNW.gather(1, inverse(order).expand(len(x_BNW), -1)[..., None].expand_as(x_BNW))
        return self.logits(x_BNW)

    def _angles(self, order_BN: Tensor | None) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the inputs' own positions, (S, D) or (B, 1, S, D)."""
        if order_BN is None:
            return self.cos[:-1], self.sin[:-1]
        own_BS = F.pad(order_BN[:, :-1] + 1, (1, 0))
        return self.cos[own_BS][:, None], self.sin[own_BS][:, None]

    def logits(self, x_BNW: Tensor) -> Tensor:
        """The blocks' output to logits, (..., W) to (..., V)."""
        head = self.code_embed.weight if self.head is None else self.head.weight
        return F.linear(self.norm_out(x_BNW), head)

    def empty_cache(self, batch: int) -> Cache:
        """Room for the keys and values of `batch` sequences."""
        shape = (batch, self.config.heads, self.space.num_tokens, self.cos.shape[-1])
        keys, values = (
            tuple(self.code_embed.weight.new_zeros(shape) for _ in range(self.config.layers)) for _ in range(2)
        )
        return Cache(keys, values)

    def step(self, x_BW: Tensor, position: Tensor, cache: Cache) -> Tensor:
        """Logits (B, V) of the code that is drawn at `position` of the order; shapes do not depend on the position.

        Args:
            x_BW: embedding of the class at position 0, then of the last code.
            position: scalar int64, from 0.
            cache: of `empty_cache`; written at `position`.

        Raises:
            ValueError: the cache is of other sizes.
        """
        check_cache(cache, len(x_BW), self.space.num_tokens)
        unseen_N = torch.arange(self.space.num_tokens, device=x_BW.device) > position
        # Indexed with `position` itself, the host would wait for it: no CUDA graph could be captured.
        cos, sin = (table.index_select(0, position[None]) for table in (self.cos, self.sin))
        place = Place(position, cos, sin, unseen_N)
        if self.target_positions is not None:
            x_BW = x_BW + self.target_positions(position)
        x_B1W = x_BW[:, None]
        for block, keys_BHND, values_BHND in zip(self.blocks, *cache, strict=True):
            assert isinstance(block, Block)
            x_B1W = block.step(x_B1W, place, keys_BHND, values_BHND)
        return self.logits(x_B1W)[:, 0]


def check_cache(cache: Cache, batch: int, num_tokens: int) -> None:
    """Refuse a cache of other sizes.

    Raises:
        ValueError: naming both.
    """
    wanted, there = (batch, num_tokens), cache.keys[0].shape[::2]
    if there != wanted:
        raise ValueError(
            f"the cache holds {there[0]} sequences of {there[1]} codes, not {wanted[0]} of {wanted[1]}: make it "
            f"with empty_cache({wanted[0]})"
        )
