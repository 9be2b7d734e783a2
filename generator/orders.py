"""Generation orders of an autoregressive generator: natural, fixed, or random and annealed to natural.

An order lists dataset positions: order[s] is the position of the code that is predicted s-th.

Shapes: B sequences, N codes per sequence.
"""

import torch
from torch import Tensor

from generator.config import AnnealedOrder, FixedOrder


def fixed_order(config: FixedOrder, num_tokens: int) -> Tensor:
    """Return the order of a config, (N,) int64; the same on every machine."""
    return torch.randperm(num_tokens, generator=torch.Generator().manual_seed(config.seed), device="cpu")


def random_share(config: AnnealedOrder, step: int) -> float:
    """Return the probability that an order is random at training step `step` (from 0): 1, then linear decay to 0."""
    if step < config.start_step:
        return 1.0
    if step >= config.end_step:
        return 0.0
    return 1 - (step - config.start_step) / (config.end_step - config.start_step)


def draw_orders(config: AnnealedOrder, batch: int, num_tokens: int, *, step: int, generator: torch.Generator) -> Tensor:
    """Draw the orders of a training batch, (B, N) int64, each random with the step's probability, else natural."""
    is_random_B = torch.rand(batch, generator=generator) < random_share(config, step)
    random_BN = torch.rand(batch, num_tokens, generator=generator).argsort(dim=1)
    return torch.where(is_random_B[:, None], random_BN, torch.arange(num_tokens))


def inverse(order: Tensor) -> Tensor:
    """Invert orders, (..., N): the step at which each position's code is predicted."""
    return order.argsort(dim=-1)
