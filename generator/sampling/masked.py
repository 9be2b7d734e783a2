"""Masked sampling: predict all codes, keep the most confident, mask the rest again (method.md 1.5).

Shapes: B sequences, N codes per sequence, V codebook size, T steps.
"""

import math
from typing import Protocol

import torch
from torch import Tensor

from generator.config import MaskedConfig, SampleConfig
from generator.sampling.filters import guidance_scales, guide, invert
from generator.sampling.sampler import CodeSampler, SampledNetwork

NUMBERS = 2
"""Uniform numbers per code and step: one chooses the code, one perturbs its confidence."""


class MaskedNetwork(SampledNetwork, Protocol):
    """Interface that a sampler needs of a network: maps class ids and codes, `mask_id` if masked, to logits."""

    config: MaskedConfig

    @property
    def mask_id(self) -> int:
        """Return the id of the mask token."""

    def __call__(self, class_B: Tensor, ids_BN: Tensor) -> Tensor:
        """Return logits (B, N, V)."""


def gumbel(uniform: Tensor) -> Tensor:
    """Transform uniform numbers in [0, 1) to standard Gumbel noise, float32."""
    return -(-uniform.double().clamp_min(1e-20).log()).clamp_min(1e-20).log().float()


def kept_hidden(num_tokens: int, progress: float) -> int:
    """Return how many codes stay masked after a share `progress` of steps: floor(N * arccos(progress) / (pi / 2))."""
    return math.floor(num_tokens * math.acos(progress) / (math.pi / 2))


def choose(logits_BNV: Tensor, uniform_BN: Tensor, noise: float) -> Tensor:
    """Draw the argmax of logits + noise * Gumbel, (B, N) int64.

    Drawn from its distribution, softmax(logits / noise), which takes one number per code instead of V.
    """
    if noise == 0:
        return logits_BNV.argmax(-1)
    probability_MV = (logits_BNV / noise).softmax(-1).flatten(0, 1)
    return invert(probability_MV, uniform_BN.flatten()).view(uniform_BN.shape)


def hide(confidence_BN: Tensor, hidden_BN: Tensor, count: int) -> Tensor:
    """Select the `count` least confident of the masked codes of each sequence, by rank, to be masked again.

    At least one code is revealed per step, and at least one stays masked unless only one is left.
    """
    count_B = (hidden_BN.sum(1) - 1).clamp(max=max(count, 1))
    rank_BN = confidence_BN.masked_fill(~hidden_BN, math.inf).argsort(dim=1, stable=True).argsort(1)
    return rank_BN < count_B[:, None]


class MaskedSampler(CodeSampler):
    """Sampler of a masked generator; it takes two numbers per code and step, (T, 2, N)."""

    network: MaskedNetwork

    def __init__(self, network: MaskedNetwork, config: SampleConfig) -> None:
        """Take a network in evaluation mode.

        Raises:
            ValueError: the config has settings for another kind of generator.
        """
        config.fit(network.config)
        self.network, self.config = network, config
        self.numbers = (config.num_steps, NUMBERS, network.space.num_tokens)

    @torch.inference_mode()
    def _draw(self, class_B: Tensor, uniform: Tensor) -> Tensor:
        network, steps = self.network, self.config.num_steps
        mask_id, num_tokens = network.mask_id, network.space.num_tokens
        ids_BN = torch.full((len(class_B), num_tokens), mask_id, device=network.device)
        for step, scale in enumerate(guidance_scales(self.config, steps)):
            progress = (step + 1) / steps
            noise, hidden_BN = self.config.temperature * (1 - progress), ids_BN == mask_id
            logits_BNV = guided(network, class_B, ids_BN, scale)
            if self.config.annealing is not None:
                start, slope = self.config.annealing
                logits_BNV = logits_BNV / (start + slope * (1 - progress))
            chosen_BN = choose(logits_BNV, uniform[:, step, 0], noise)
            ids_BN = torch.where(hidden_BN, chosen_BN, ids_BN)
            if step < steps - 1:
                confidence_BN = logits_BNV.gather(-1, ids_BN[..., None])[..., 0]
                confidence_BN = confidence_BN + noise * gumbel(uniform[:, step, 1])
                again_BN = hide(confidence_BN, hidden_BN, kept_hidden(num_tokens, progress))
                ids_BN = ids_BN.masked_fill(again_BN, mask_id)
        return ids_BN


def guided(network: MaskedNetwork, class_B: Tensor, ids_BN: Tensor, scale: float) -> Tensor:
    """Return guided logits (B, N, V) in float32, from one batch of twice the size unless scale is 1 or no classes."""
    if scale == 1 or not network.space.num_classes:
        return network(class_B, ids_BN).float()
    rows = torch.cat([class_B, torch.full_like(class_B, network.space.null_class)])
    cond_BNV, uncond_BNV = network(rows, ids_BN.repeat(2, 1)).float().chunk(2)
    return guide(cond_BNV, uncond_BNV, scale)
