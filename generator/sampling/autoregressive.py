"""Autoregressive sampling: class ids and uniform numbers in, codes out. Pure: all randomness is in the numbers.

A step is one graph of static shapes: the class and every code go through the same one, each at its position of a
cache of full length; guidance is a second half of the rows; logits are those of one position.

Shapes: B sequences, R rows (twice B with guidance), N codes a sequence, V codebook size, W width.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from generator.autoregressive import Generator
from generator.code_space import CodeSpace
from generator.config import GeneratorConfig, SampleConfig
from generator.sampling.filters import draw, guidance_scales, guide

Cache = Any
"""What the network keeps of the positions it has seen; each sort of network has its own."""
Advance = Callable[[Tensor, Tensor, Tensor, Tensor, Cache], tuple[Tensor, Tensor]]
Pick = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
DrawAll = Callable[[Tensor, Tensor, Tensor], Tensor]
"""First embeddings (R, W), uniform numbers (B, N) and guidance scales (N,) to codes (B, N) in the order of drawing."""


class Steps(Protocol):
    """What a sampler asks of a network: the generator itself, or a twin of it that computes faster."""

    config: GeneratorConfig
    space: CodeSpace
    class_embed: nn.Embedding
    code_embed: nn.Embedding
    order: Tensor

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    def empty_cache(self, batch: int) -> Cache:
        """Room for the keys and values of `batch` sequences."""

    def step(self, x_BW: Tensor, position: Tensor, cache: Cache) -> Tensor:
        """Logits (B, V) of the code that is drawn at `position`."""


class Sampler:
    """Draws micro-batches from one network with one config."""

    def __init__(self, network: Steps, config: SampleConfig) -> None:
        """Take a network in evaluation mode.

        Raises:
            ValueError: the config has settings of masked generators.
        """
        config.fit("autoregressive")
        self.network, self.config, self.advance = network, config, advance_of(network, pick_of(network, config))
        # Made once: what is sent to a GPU for every batch lets the host wait for the batch before.
        scales = guidance_scales(config, network.space.num_tokens)
        self.scales_N = torch.tensor(scales, dtype=torch.float32, device=network.device)
        self.draw_all: DrawAll | None = None
        """draws all codes in place of `advance`, called again and again"""
        self.numbers: tuple[int, ...] = (network.space.num_tokens,)
        """Shape of the uniform numbers that a sample needs."""

    def __call__(self, class_B: Tensor, uniform_BN: Tensor) -> Tensor:
        """Draw codes (B, N) int64 in the dataset's layout; `null_class` draws without a class.

        Args:
            class_B: class ids in [0, num_classes].
            uniform_BN: one number in [0, 1) a code, float32 or float64.

        Raises:
            ValueError: class ids out of range, or numbers of another shape.
        """
        check_inputs(self.network.space, class_B, uniform_BN, self.numbers)
        return self._draw(class_B.to(self.network.device), uniform_BN.to(self.network.device)).clone()

    @torch.inference_mode()
    def _draw(self, class_B: Tensor, uniform_BN: Tensor) -> Tensor:
        space = self.network.space
        is_guided = guides(self.config, space)
        rows_R = torch.cat([class_B, torch.full_like(class_B, space.null_class)]) if is_guided else class_B
        x_RW = self.network.class_embed(rows_R)
        drawn_BN = (self.draw_all or self._one_by_one)(x_RW, uniform_BN, self.scales_N)
        return torch.empty_like(drawn_BN).index_copy_(1, self.network.order, drawn_BN)

    def _one_by_one(self, x_RW: Tensor, uniform_BN: Tensor, scales_N: Tensor) -> Tensor:
        cache, codes = self.network.empty_cache(len(x_RW)), []
        for place, position in enumerate(torch.arange(len(scales_N), device=x_RW.device)):
            code_B, x_RW = self.advance(x_RW, position, uniform_BN[:, place], scales_N[place], cache)
            codes.append(code_B)
        return torch.stack(codes, dim=1)


def guides(config: SampleConfig, space: CodeSpace) -> bool:
    """Whether rows without a class are computed beside those with one; where there are no classes they are the same."""
    return config.cfg_scale != 1 and space.num_classes > 0


def advance_of(network: Steps, pick: Pick) -> Advance:
    """The step of a sampler as a function of tensors alone: what is compiled or recorded.

    It maps an embedding (R, W), a scalar position, uniform numbers (B,), a scalar guidance scale and a cache, which it
    writes, to codes (B,) and their embedding (R, W).
    """

    def advance(
        x_RW: Tensor, position: Tensor, uniform_B: Tensor, scale: Tensor, cache: Cache
    ) -> tuple[Tensor, Tensor]:
        return pick(network.step(x_RW, position, cache), uniform_B, scale)

    return advance


def pick_of(network: Steps, config: SampleConfig) -> Pick:
    """The end of a step: logits (R, V), uniform numbers (B,) and a scalar scale to codes (B,) and their embedding."""

    def pick(logits_RV: Tensor, uniform_B: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        code_B = draw(guided_logits(logits_RV, scale, config, network.space), uniform_B, config)
        return code_B, network.code_embed(code_B.repeat(2) if guides(config, network.space) else code_B)

    return pick


def guided_logits(logits_RV: Tensor, scale: Tensor, config: SampleConfig, space: CodeSpace) -> Tensor:
    """Logits (B, V) float32, of both halves of the rows where the config guides."""
    logits_RV = logits_RV.float()
    if not guides(config, space):
        return logits_RV
    cond_BV, uncond_BV = logits_RV.chunk(2)
    return guide(cond_BV, uncond_BV, scale)


def check_inputs(space: CodeSpace, class_B: Tensor, uniform: Tensor, numbers: tuple[int, ...]) -> None:
    """Refuse what no sample can be drawn from.

    Raises:
        ValueError: class ids out of range, or numbers of another shape.
    """
    space.check_classes(class_B)
    if uniform.shape != (len(class_B), *numbers):
        raise ValueError(f"uniform numbers of shape {tuple(uniform.shape)}, not {(len(class_B), *numbers)}: draw those")


def sample(model: Generator, class_B: Tensor, uniform_BN: Tensor, config: SampleConfig) -> Tensor:
    """Draw codes (B, N) int64 from the network as it is, on its device and in its type; see `Sampler`.

    `precision` and `compile` of the config are for `prepare_sampler`, which does the same faster.
    """
    return Sampler(model, config)(class_B, uniform_BN)
