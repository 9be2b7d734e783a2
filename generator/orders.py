"""In which order an autoregressive generator sees codes: natural, fixed, or random and annealed to natural.

An order lists dataset positions: order[s] is the position of the code that is predicted s-th.

Shapes: B sequences, N codes a sequence.
"""

import torch
from torch import Tensor

from generator.config import AnnealedOrder, FixedOrder


def fixed_order(config: FixedOrder, num_tokens: int) -> Tensor:
    """The order of a config, (N,) int64; the same on every machine."""
    return torch.randperm(num_tokens, generator=torch.Generator().manual_seed(config.seed), device="cpu")


def random_share(config: AnnealedOrder, step: int) -> float:
    """Probability that an order of training step `step` (from 0) is random: 1, then falling linearly, then 0."""
    if step < config.start_step:
        return 1.0
    if step >= config.end_step:
        return 0.0
    return 1 - (step - config.start_step) / (config.end_step - config.start_step)


def draw_orders(config: AnnealedOrder, batch: int, num_tokens: int, *, step: int, generator: torch.Generator) -> Tensor:
    """The orders of a training batch, (B, N) int64: one a sequence, random with the probability of the step."""
    is_random_B = torch.rand(batch, generator=generator) < random_share(config, step)
    random_BN = torch.rand(batch, num_tokens, generator=generator).argsort(dim=1)
    return torch.where(is_random_B[:, None], random_BN, torch.arange(num_tokens))


def inverse(order: Tensor) -> Tensor:
    """When the code of each position is predicted, (..., N): gathering by both, in turn, changes nothing."""
    return order.argsort(dim=-1)
