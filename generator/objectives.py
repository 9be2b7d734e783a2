"""Masks and losses of generators, in training and on held-out codes. Pure: all randomness comes from arguments.

Shapes: B sequences, N codes per sequence, V codebook size.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from generator.network import GeneratorNetwork

EPSILON = 1e-8


def random_mask(batch: int, num_tokens: int, generator: torch.Generator) -> Tensor:
    """Draw masks (B, N), true = masked: a share by the arccos schedule, at least one code, uniform positions."""
    ratio_B = torch.arccos(torch.rand(batch, generator=generator)) / (math.pi / 2)
    count_B = (ratio_B * num_tokens).round().clamp_min(1)
    rank_BN = torch.rand(batch, num_tokens, generator=generator).argsort(1).argsort(1)
    return rank_BN < count_B[:, None]


def masked_loss(
    logits_BNV: Tensor, codes_BN: Tensor, hidden_BN: Tensor, *, unmasked_weight: float, label_smoothing: float
) -> Tensor:
    """Return the weighted mean cross-entropy: weight 1 for masked codes, `unmasked_weight` for the others."""
    loss_BN = F.cross_entropy(
        logits_BNV.float().transpose(1, 2), codes_BN, reduction="none", label_smoothing=label_smoothing
    )
    weight_BN = code_weights(hidden_BN, unmasked_weight)
    return (loss_BN * weight_BN).sum() / (weight_BN.sum() + EPSILON)


def code_weights(hidden_BN: Tensor, unmasked_weight: float) -> Tensor:
    """Return the weight of each code in the loss, (B, N): 1 if it is masked."""
    return hidden_BN.float() + unmasked_weight * (~hidden_BN).float()


class HeldOutPredictions(NamedTuple):
    """Predictions of held-out codes, (B, N) each."""

    losses: Tensor
    """negative log-likelihood in nats, float32; 0 for codes that were not predicted."""
    right: Tensor
    """bool: whether the most likely code is the true one."""
    counted: Tensor
    """bool: whether the code was predicted; a masked generator predicts only masked codes."""


def held_out_losses(
    network: GeneratorNetwork, class_B: Tensor, codes_BN: Tensor, generator: torch.Generator, at_once: int
) -> HeldOutPredictions:
    """Predict every code given those before it, or masked codes given the others, with masks drawn from `generator`.

    The network sees `at_once` sequences per pass; the masks do not depend on it, since they are drawn for all at once.
    """
    counted_BN = network.draw_targets(codes_BN, generator)
    parts = zip(class_B.split(at_once), codes_BN.split(at_once), counted_BN.split(at_once), strict=True)
    predictions = [_predictions(network, *part) for part in parts]
    return HeldOutPredictions(*map(torch.cat, zip(*predictions, strict=True)))


def _predictions(
    network: GeneratorNetwork, class_B: Tensor, codes_BN: Tensor, counted_BN: Tensor
) -> HeldOutPredictions:
    """Compute one pass and compare the counted codes."""
    logits_BNV = network.predict(class_B, codes_BN, counted_BN).float()
    loss_M = F.cross_entropy(logits_BNV.flatten(0, 1), codes_BN.flatten(), reduction="none")
    loss_BN = loss_M.view_as(codes_BN).masked_fill(~counted_BN, 0.0)
    return HeldOutPredictions(loss_BN, (logits_BNV.argmax(-1) == codes_BN) & counted_BN, counted_BN)
