"""What generators learn: the next code, or the hidden ones. Pure: randomness comes from the generators given.

Shapes: B sequences, N codes a sequence, V codebook size.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from generator.autoregressive import Generator
from generator.config import AnnealedOrder, GeneratorConfig, MaskedConfig
from generator.masked import MaskedGenerator
from generator.orders import draw_orders

EPSILON = 1e-8


def random_mask(batch: int, num_tokens: int, generator: torch.Generator) -> Tensor:
    """Training mask (B, N), true = hidden: a share by the arccos schedule, one code at least, positions uniformly."""
    ratio_B = torch.arccos(torch.rand(batch, generator=generator)) / (math.pi / 2)
    count_B = (ratio_B * num_tokens).round().clamp_min(1)
    rank_BN = torch.rand(batch, num_tokens, generator=generator).argsort(1).argsort(1)
    return rank_BN < count_B[:, None]


def masked_loss(
    logits_BNV: Tensor, codes_BN: Tensor, hidden_BN: Tensor, *, unmasked_weight: float, label_smoothing: float
) -> Tensor:
    """Cross-entropy, weighted 1 where hidden and `unmasked_weight` where given; the weighted mean."""
    loss_BN = F.cross_entropy(
        logits_BNV.float().transpose(1, 2), codes_BN, reduction="none", label_smoothing=label_smoothing
    )
    weight_BN = hidden_BN.float() + unmasked_weight * (~hidden_BN).float()
    return (loss_BN * weight_BN).sum() / (weight_BN.sum() + EPSILON)


def draw_view(
    config: GeneratorConfig | MaskedConfig, batch: int, num_tokens: int, *, step: int, generator: torch.Generator
) -> Tensor | None:
    """How a training step looks at its codes, one row a sequence: masks, or orders, or None where there is one way.

    To be drawn for the whole batch of a step and cut like the batch, so that micro-batches and ranks change nothing.
    """
    if isinstance(config, MaskedConfig):
        return random_mask(batch, num_tokens, generator)
    if isinstance(config.order, AnnealedOrder):
        return draw_orders(config.order, batch, num_tokens, step=step, generator=generator)
    return None


def training_loss(
    network: Generator | MaskedGenerator,
    class_B: Tensor,
    codes_BN: Tensor,
    view_BN: Tensor | None,
    *,
    label_smoothing: float,
) -> Tensor:
    """The mean loss of a micro-batch; `view_BN` are its rows of `draw_view`."""
    if isinstance(network, MaskedGenerator):
        assert view_BN is not None
        logits_BNV = network(class_B, codes_BN.masked_fill(view_BN, network.mask_id))
        weight = network.config.unmasked_weight
        return masked_loss(logits_BNV, codes_BN, view_BN, unmasked_weight=weight, label_smoothing=label_smoothing)
    logits_BNV = network(class_B, codes_BN, view_BN)
    return F.cross_entropy(logits_BNV.float().flatten(0, 1), codes_BN.flatten(), label_smoothing=label_smoothing)


class HeldOut(NamedTuple):
    """What was predicted of held-out codes, (B, N) each."""

    losses: Tensor
    """negative log-likelihood in nats, float32; 0 where a code was not predicted."""
    right: Tensor
    """bool: whether the most likely code is the true one."""
    counted: Tensor
    """bool: whether the code was predicted; a masked generator predicts those that are hidden from it."""


def held_out_losses(
    network: Generator | MaskedGenerator, class_B: Tensor, codes_BN: Tensor, generator: torch.Generator, at_once: int
) -> HeldOut:
    """Of every code given those before it, or of hidden codes given the others, under masks of `generator`.

    The network sees `at_once` sequences a pass; masks are drawn for all at once and do not depend on it.
    """
    if isinstance(network, MaskedGenerator):
        counted_BN = random_mask(len(codes_BN), codes_BN.shape[1], generator).to(codes_BN.device)
    else:
        counted_BN = torch.ones_like(codes_BN, dtype=torch.bool)
    parts = zip(class_B.split(at_once), codes_BN.split(at_once), counted_BN.split(at_once), strict=True)
    found = [_predicted(network, *part) for part in parts]
    return HeldOut(*map(torch.cat, zip(*found, strict=True)))


def _predicted(network: Generator | MaskedGenerator, class_B: Tensor, codes_BN: Tensor, counted_BN: Tensor) -> HeldOut:
    """What one pass predicts of the codes that are counted."""
    seen_BN = codes_BN.masked_fill(counted_BN, network.mask_id) if isinstance(network, MaskedGenerator) else codes_BN
    logits_BNV = network(class_B, seen_BN).float()
    loss_M = F.cross_entropy(logits_BNV.flatten(0, 1), codes_BN.flatten(), reduction="none")
    loss_BN = loss_M.view_as(codes_BN).masked_fill(~counted_BN, 0.0)
    return HeldOut(loss_BN, (logits_BNV.argmax(-1) == codes_BN) & counted_BN, counted_BN)
