"""Autoregressive sampling: maps class ids and uniform numbers to codes. Pure: all randomness is in the numbers.

A step has static shapes, so that one graph serves the class and every code, each at its position of a full-length
cache; guidance adds a second half of rows; logits are computed for one position.

Shapes: B sequences, R rows (twice B with guidance), N codes per sequence, V codebook size, W width.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from generator.code_space import CodeSpace
from generator.config import GeneratorConfig, SampleConfig
from generator.sampling.filters import draw, guidance_scales, guide
from generator.sampling.sampler import CodeSampler, SampledNetwork

Cache = Any
"""A network's key-value cache; each kind of network has its own type."""
Advance = Callable[[Tensor, Tensor, Tensor, Tensor, Cache], tuple[Tensor, Tensor]]
Pick = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
DrawAll = Callable[[Tensor, Tensor, Tensor], Tensor]
"""First embeddings (R, W), uniform numbers (B, N) and guidance scales (N,) to codes (B, N) in the order of drawing."""


class CachedNetwork(SampledNetwork, Protocol):
    """Interface that a sampler needs of a network: the generator itself, or a faster implementation of it."""

    config: GeneratorConfig
    class_embed: nn.Embedding
    code_embed: nn.Embedding
    order: Tensor

    def empty_cache(self, batch: int) -> Cache:
        """Allocate a cache for `batch` sequences."""

    def step(self, x_BW: Tensor, position: Tensor, cache: Cache) -> Tensor:
        """Return logits (B, V) of the code at `position`."""


class Sampler(CodeSampler):
    """Sampler of an autoregressive generator; it takes one number per code."""

    network: CachedNetwork

    def __init__(self, network: CachedNetwork, config: SampleConfig) -> None:
        """Take a network in evaluation mode.

        Raises:
            ValueError: the config has settings for another kind of generator.
        """
        config.fit(network.config)
        self.network, self.config, self.advance = network, config, advance_of(network, pick_of(network, config))
        # Sent to the device once: sending it with every batch would make the host wait for the previous batch.
        scales = guidance_scales(config, network.space.num_tokens)
        self.scales_N = torch.tensor(scales, dtype=torch.float32, device=network.device)
        self.draw_all: DrawAll | None = None
        """draws all codes, if set, instead of calling `advance` for each"""
        self.numbers = (network.space.num_tokens,)

    @torch.inference_mode()
    def _draw(self, class_B: Tensor, uniform: Tensor) -> Tensor:
        space = self.network.space
        is_guided = guides(self.config, space)
        rows_R = torch.cat([class_B, torch.full_like(class_B, space.null_class)]) if is_guided else class_B
        x_RW = self.network.class_embed(rows_R)
        drawn_BN = (self.draw_all or self._one_by_one)(x_RW, uniform, self.scales_N)
        return torch.empty_like(drawn_BN).index_copy_(1, self.network.order, drawn_BN)

    def _one_by_one(self, x_RW: Tensor, uniform_BN: Tensor, scales_N: Tensor) -> Tensor:
        cache, codes = self.network.empty_cache(len(x_RW)), []
        for place, position in enumerate(torch.arange(len(scales_N), device=x_RW.device)):
            code_B, x_RW = self.advance(x_RW, position, uniform_BN[:, place], scales_N[place], cache)
            codes.append(code_B)
        return torch.stack(codes, dim=1)


def guides(config: SampleConfig, space: CodeSpace) -> bool:
    """Tell whether unconditional rows are computed beside conditional ones; without classes they would be equal."""
    return config.cfg_scale != 1 and space.num_classes > 0


def advance_of(network: CachedNetwork, pick: Pick) -> Advance:
    """Make a sampler's step as a function of tensors only, which can be compiled or recorded.

    It maps an embedding (R, W), a scalar position, uniform numbers (B,), a scalar guidance scale and a cache, which it
    updates, to codes (B,) and their embedding (R, W).
    """

    def advance(
        x_RW: Tensor, position: Tensor, uniform_B: Tensor, scale: Tensor, cache: Cache
    ) -> tuple[Tensor, Tensor]:
        return pick(network.step(x_RW, position, cache), uniform_B, scale)

    return advance


def pick_of(network: CachedNetwork, config: SampleConfig) -> Pick:
    """Make the end of a step: maps logits (R, V), uniform numbers (B,) and a scalar scale to codes and embeddings."""

    def pick(logits_RV: Tensor, uniform_B: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        code_B = draw(guided_logits(logits_RV, scale, config, network.space), uniform_B, config)
        return code_B, network.code_embed(code_B.repeat(2) if guides(config, network.space) else code_B)

    return pick


def guided_logits(logits_RV: Tensor, scale: Tensor, config: SampleConfig, space: CodeSpace) -> Tensor:
    """Return logits (B, V) in float32; with guidance, combined from both halves of the rows."""
    logits_RV = logits_RV.float()
    if not guides(config, space):
        return logits_RV
    cond_BV, uncond_BV = logits_RV.chunk(2)
    return guide(cond_BV, uncond_BV, scale)
