"""Compute the learning rate of a step: linear warm-up, then cosine decay."""

import math

from infra.training.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Return the rate at `step` (from 0) of `steps`: linear warm-up from 0, then cosine decay to `end_lr`."""
    if step < config.warmup_steps:
        return config.lr * step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.end_lr + (config.lr - config.end_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
