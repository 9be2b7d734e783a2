"""Count the operations of a forward pass of each network, per image, by formula from sizes alone.

A product of (a, b) and (b, c) is 2abc operations, a convolution the products that it is made of. As usual, everything
else is left out: norms, softmax, embeddings, and products of a matrix and a vector.

Sizes: S positions, N latent tokens, P proxy positions, W width, K codes, V proxy codes, D and C channels of a code.
"""

from itertools import pairwise

from sftok.config import TeacherConfig, TokenizerConfig, TransformerConfig


def product(rows: int, inputs: int, outputs: int) -> int:
    """Product of a (rows, inputs) and an (inputs, outputs) matrix."""
    return 2 * rows * inputs * outputs


def convolution(inputs: int, outputs: int, kernel: int, side: int) -> int:
    """Convolution with `side` x `side` output positions and a `kernel` x `kernel` window."""
    return product(side**2, inputs * kernel**2, outputs)


def res_block(inputs: int, outputs: int, side: int) -> int:
    """Residual block: two 3x3 convolutions, and a projection where the width changes."""
    shortcut = convolution(outputs, outputs, 1, side) if inputs != outputs else 0
    return convolution(inputs, outputs, 3, side) + convolution(outputs, outputs, 3, side) + shortcut


def _level(inputs: int, outputs: int, side: int, config: TeacherConfig) -> int:
    """Blocks of a level, the first of which changes the width."""
    return res_block(inputs, outputs, side) + (config.num_res_blocks - 1) * res_block(outputs, outputs, side)


def teacher_first(config: TeacherConfig, image_size: int) -> int:
    """The teacher encoder's first convolution, whose input needs no gradient."""
    return convolution(3, config.base_channels, 3, image_size)


def teacher_encoder(config: TeacherConfig, image_size: int) -> int:
    """The teacher's encoder, image to latents."""
    widths = [config.base_channels * m for m in config.channel_multipliers]
    side = image_size // config.downsample_factor
    levels = sum(
        _level(inputs, outputs, image_size >> at, config)
        for at, (inputs, outputs) in enumerate(pairwise([config.base_channels, *widths]))
    )
    mid = config.num_res_blocks * res_block(widths[-1], widths[-1], side)
    return teacher_first(config, image_size) + levels + mid + convolution(widths[-1], config.latent_channels, 1, side)


def teacher_decoder(config: TeacherConfig, image_size: int) -> int:
    """The teacher's decoder, latents to image."""
    widths = [config.base_channels * m for m in config.channel_multipliers]
    side = image_size // config.downsample_factor
    total = convolution(config.latent_channels, widths[-1], 3, side)
    total += config.num_res_blocks * res_block(widths[-1], widths[-1], side)
    for at, (inputs, outputs) in enumerate(pairwise([widths[-1], *reversed(widths)])):
        total += _level(inputs, outputs, side << at, config)
        if at + 1 < len(widths):
            total += convolution(outputs, outputs, 3, side << (at + 1))
    return total + convolution(widths[0], 3, 3, image_size)


def nearest_code(config: TeacherConfig, image_size: int) -> int:
    """Distances of all positions from all proxy codes."""
    return product((image_size // config.downsample_factor) ** 2, config.latent_channels, config.codebook_size)


def transformer(config: TransformerConfig, positions: int, kept: int) -> int:
    """Transformer blocks on `positions` positions; the last one computes `kept` of them only."""
    width = config.width

    def block(queries: int) -> int:
        linear = product(queries, width, 10 * width) + product(positions, width, 2 * width)  # q, out, MLP; k, v
        return linear + 2 * product(queries, width, positions)

    return (config.layers - 1) * block(positions) + block(kept)


def patches(config: TokenizerConfig, image_size: int) -> int:
    """The encoder's patch embedding, whose input needs no gradient."""
    return convolution(3, config.encoder.width, config.patch_size, image_size // config.patch_size)


def encoder(config: TokenizerConfig, image_size: int) -> int:
    """The encoder, image to latent tokens."""
    tokens, width = config.num_latent_tokens, config.encoder.width
    positions = 1 + (image_size // config.patch_size) ** 2 + tokens
    blocks = transformer(config.encoder, positions, tokens)
    return patches(config, image_size) + blocks + product(tokens, width, config.code_dim)


def assignment(config: TokenizerConfig) -> int:
    """Code assignment: similarities of all latent tokens to all codes."""
    return product(config.num_latent_tokens, config.code_dim, config.codebook_size)


def codebook(config: TokenizerConfig) -> int:
    """The linear layer that all codes share: once per pass, not per image."""
    return product(config.codebook_size, config.code_dim, config.code_dim)


def latents(config: TokenizerConfig) -> int:
    """The decoder's embedding of quantized latent tokens."""
    return product(config.num_latent_tokens, config.code_dim, config.decoder.width)


def decoder(config: TokenizerConfig, teacher: TeacherConfig, image_size: int) -> int:
    """The decoder, latent tokens and proxy codes to logits."""
    width, proxies = config.decoder.width, (image_size // teacher.downsample_factor) ** 2
    blocks = transformer(config.decoder, 1 + proxies + config.num_latent_tokens, proxies)
    head = product(proxies, width, 2 * width) + product(proxies, 2 * width, teacher.codebook_size)
    return latents(config) + blocks + head


def soft_codes(teacher: TeacherConfig, image_size: int) -> int:
    """Expected pixel codes of all positions."""
    return product((image_size // teacher.downsample_factor) ** 2, teacher.codebook_size, teacher.latent_channels)
