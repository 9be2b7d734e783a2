"""How much arithmetic a generator's training takes: by formula, from its sizes alone.

A product of (a, b) and (b, c) is 2abc operations; what is no matrix product (norms, softmax, embeddings) is left out,
as is usual. Causal attention is counted in full, and blocks that are computed twice to save memory once: this is the
model's arithmetic, not the machine's.

Sizes: S positions, N codes a sequence, V codebook size, W width, F feed-forward width.
"""

from generator.code_space import CodeSpace
from generator.config import GeneratorConfig, MaskedConfig


def forward_flops(config: GeneratorConfig | MaskedConfig, space: CodeSpace) -> int:
    """Operations of one sequence's forward pass, logits of all codes included."""
    width, codes = config.width, space.num_tokens
    is_masked = isinstance(config, MaskedConfig)
    positions = codes + 1 if is_masked else codes  # the class of a masked generator is a position of its own
    attention = 2 * positions * 4 * width**2 + 4 * positions**2 * width  # four projections; scores and their sums
    matrices = 2 if is_masked else 3  # SwiGLU has a gate
    feed_forward = 2 * positions * matrices * width * config.ffn_width
    return config.layers * (attention + feed_forward) + 2 * codes * width * space.codebook_size


def training_flops(config: GeneratorConfig | MaskedConfig, space: CodeSpace) -> int:
    """Operations of one sequence's forward and backward pass: every product has two in the backward pass."""
    return 3 * forward_flops(config, space)
