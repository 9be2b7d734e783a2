"""Compute a generator's model FLOPs by formula, from its sizes.

A product of (a, b) and (b, c) counts 2abc FLOPs; everything but matrix products (norms, softmax, embeddings) is left
out, as is usual. Causal attention counts in full, and blocks recomputed to save memory count once: these are the
model's FLOPs, not the hardware's.

Sizes: S positions, N codes per sequence, V codebook size, W width, F feed-forward width.
"""

from generator.code_space import CodeSpace
from generator.config import AnyGeneratorConfig


def forward_flops(config: AnyGeneratorConfig, space: CodeSpace) -> int:
    """Return the FLOPs of one sequence's forward pass, including the logits of all codes."""
    width, codes = config.width, space.num_tokens
    positions = config.positions(codes)
    attention = 2 * positions * 4 * width**2 + 4 * positions**2 * width  # four projections; scores and weighted sums
    feed_forward = 2 * positions * config.ffn_matrices * width * config.ffn_width
    return config.layers * (attention + feed_forward) + 2 * codes * width * space.codebook_size


def training_flops(config: AnyGeneratorConfig, space: CodeSpace) -> int:
    """Return the FLOPs of one sequence's forward and backward pass: each product has two in the backward pass."""
    return 3 * forward_flops(config, space)
