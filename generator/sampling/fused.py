"""Cached steps of an autoregressive generator on a GPU, in few kernels: its blocks are regrouped between attentions.

What lies between one attention and the next is a pure function of tensors, the same for every layer, so it is compiled
once. Attention is a separate kernel (`attention_kernel`), since it updates the cache in place, which a compiled
function would have to return.

Shapes: R rows, N codes per sequence, V codebook size, W width, H heads, D channels per head, C = 3 * W.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generator.autoregressive import NORM_EPSILON, Block, Generator, rotate
from generator.key_value_cache import Cache, check_cache

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


class LayerWeights(NamedTuple):
    """Weights of one block, shared with its modules."""

    norm_1: Tensor
    qkv: Tensor
    out: Tensor
    norm_2: Tensor
    gate_up: Tensor
    down: Tensor


class FusedGenerator:
    """Cached steps with a generator's own weights; `wrap` may compile the functions between attentions."""

    def __init__(self, model: Generator, wrap: Wrap) -> None:
        self.config, self.space, self.order = model.config, model.space, model.order
        self.class_embed, self.code_embed = model.class_embed, model.code_embed
        self.model, self.heads = model, model.config.heads
        blocks = [block for block in model.blocks if isinstance(block, Block)]
        self.layers = [_weights(block) for block in blocks]
        self.gains = [_gains(block) for block in blocks]
        self.first, self.between, self.last = wrap(project), wrap(between), wrap(last)

    @property
    def device(self) -> torch.device:
        """Return the device that it computes on."""
        return self.model.device

    def empty_cache(self, batch: int) -> Cache:
        """Allocate a cache for `batch` sequences."""
        return self.model.empty_cache(batch)

    def step(self, x_BW: Tensor, position: Tensor, cache: Cache) -> Tensor:
        """Return logits (B, V) of the code at `position`, as `Generator.step` does.

        Raises:
            ValueError: the cache has other sizes.
        """
        check_cache(cache, len(x_BW), self.space.num_tokens)
        if self.model.target_positions is not None:
            x_BW = x_BW + self.model.target_positions(position)
        tables, layers = (self.model.cos, self.model.sin), self.layers
        qkv_BC = self.first(x_BW, layers[0].norm_1, layers[0].qkv)
        for number, (layer, gains) in enumerate(zip(layers, self.gains, strict=True)):
            y_BW = attend(qkv_BC, position, tables, gains, (cache.keys[number], cache.values[number]))
            if number < len(layers) - 1:
                following = layers[number + 1]
                x_BW, qkv_BC = self.between(x_BW, y_BW, layer, following.norm_1, following.qkv)
        head = self.model.code_embed if self.model.head is None else self.model.head
        return self.last(x_BW, y_BW, layers[-1], self.model.norm_out.weight, head.weight)


def _weights(block: Block) -> LayerWeights:
    attention, feed_forward = block.attention, block.feed_forward
    modules = (block.norm_1, attention.qkv, attention.out, block.norm_2, feed_forward.gate_up, feed_forward.down)
    return LayerWeights(*(module.weight.detach() for module in modules))


def _gains(block: Block) -> tuple[Tensor, Tensor] | None:
    q_norm, k_norm = block.attention.q_norm, block.attention.k_norm
    if isinstance(q_norm, nn.RMSNorm) and isinstance(k_norm, nn.RMSNorm):
        return q_norm.weight.detach(), k_norm.weight.detach()
    return None


def norm(x_RW: Tensor, gain_W: Tensor) -> Tensor:
    """Apply RMSNorm as the blocks do."""
    return F.rms_norm(x_RW, gain_W.shape, gain_W, NORM_EPSILON)


def project(x_RW: Tensor, norm_W: Tensor, qkv_CW: Tensor) -> Tensor:
    """Normalise and project to queries, keys and values side by side, (R, C)."""
    return F.linear(norm(x_RW, norm_W), qkv_CW)


def rest(x_RW: Tensor, y_RW: Tensor, layer: LayerWeights) -> Tensor:
    """Compute the part of a block after its attention."""
    x_RW = x_RW + F.linear(y_RW, layer.out)
    gate, up = F.linear(norm(x_RW, layer.norm_2), layer.gate_up).chunk(2, dim=-1)
    return x_RW + F.linear(F.silu(gate) * up, layer.down)


def between(x_RW: Tensor, y_RW: Tensor, layer: LayerWeights, norm_W: Tensor, qkv_CW: Tensor) -> tuple[Tensor, Tensor]:
    """Compute everything from the attention of one block to that of the next."""
    x_RW = rest(x_RW, y_RW, layer)
    return x_RW, project(x_RW, norm_W, qkv_CW)


def last(x_RW: Tensor, y_RW: Tensor, layer: LayerWeights, norm_W: Tensor, head_VW: Tensor) -> Tensor:
    """Compute everything from the attention of the last block to the logits (R, V)."""
    return F.linear(norm(rest(x_RW, y_RW, layer), norm_W), head_VW)


def attend(
    qkv_RC: Tensor,
    position: Tensor,
    tables: tuple[Tensor, Tensor],
    gains: tuple[Tensor, Tensor] | None,
    cache: tuple[Tensor, Tensor],
) -> Tensor:
    """Compute attention (R, W) of one position to itself and those before it.

    Args:
        qkv_RC: queries, keys and values, each H * D wide.
        position: scalar int64.
        tables: cosines and sines, (N + 1, D) float32.
        gains: of the norms of queries and keys, (D,) each; None: they are not normalised.
        cache: keys and values, (R, H, N, D) each and contiguous, written at `position`.
    """
    if qkv_RC.is_cuda:
        from generator.sampling.attention_kernel import launch

        with torch.cuda.device(qkv_RC.device):
            return launch(qkv_RC, position, tables, gains, cache, NORM_EPSILON)
    keys_RHND, values_RHND = cache
    _, heads, count, dim = keys_RHND.shape
    where = position[None]
    q_RH1D, k_RH1D, v_RH1D = qkv_RC.unflatten(-1, (3, heads, 1, dim)).unbind(1)
    if gains is not None:
        q_RH1D, k_RH1D = norm(q_RH1D, gains[0]), norm(k_RH1D, gains[1])
    cos, sin = (table.index_select(0, where) for table in tables)
    keys_RHND.index_copy_(2, where, rotate(k_RH1D, cos, sin).to(v_RH1D.dtype))
    values_RHND.index_copy_(2, where, v_RH1D)
    scores_RH1N = rotate(q_RH1D, cos, sin).float() * dim**-0.5 @ keys_RHND.float().transpose(-1, -2)
    unseen_N = torch.arange(count, device=qkv_RC.device) > position
    share_RH1N = scores_RH1N.masked_fill(unseen_N, -torch.inf).softmax(-1)
    return (share_RH1N @ values_RHND.float()).flatten(1).to(qkv_RC.dtype)
