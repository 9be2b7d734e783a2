"""Count the operations of a forward pass of LPIPS and of the discriminators, per image; see `sftok.model.flops`."""

from itertools import pairwise

from sftok.config import AdversarialConfig
from sftok.losses.dino import LAYERS, PATCH, READOUTS, SIZE, WIDTH
from sftok.losses.perceptual import LEVELS
from sftok.model.flops import convolution, product


def vgg(image_size: int) -> int:
    """VGG16 of LPIPS."""
    total, inputs = 0, 3
    for at, level in enumerate(LEVELS):
        for outputs in level:
            total += convolution(inputs, outputs, 3, image_size >> at)
            inputs = outputs
    return total


def lpips_weights(image_size: int) -> int:
    """Channel weights of LPIPS, at each level."""
    return sum(convolution(level[-1], 1, 1, image_size >> at) for at, level in enumerate(LEVELS))


def patch_first(config: AdversarialConfig, image_size: int) -> int:
    """The patch discriminator's first convolution."""
    return convolution(3, config.channels, 4, image_size // 2)


def patch_discriminator(config: AdversarialConfig, image_size: int) -> int:
    """The patch discriminator, image to logits of patches."""
    widths = [config.channels * min(1 << at, 8) for at in range(config.layers + 1)]
    total, side = patch_first(config, image_size), image_size // 2
    for at, (inputs, outputs) in enumerate(pairwise(widths)):
        side = side - 1 if at == config.layers - 1 else side // 2
        total += convolution(inputs, outputs, 4, side)
    return total + convolution(widths[-1], 1, 4, side - 1)


def dino_attention(image_size: int) -> int:
    """Scores and weighted sums in the attention of the frozen DINO, for images reduced to its size."""
    tokens = 1 + (min(image_size, SIZE) // PATCH) ** 2
    return LAYERS * 2 * product(tokens, WIDTH, tokens)


def dino(image_size: int) -> int:
    """The frozen DINO, for images reduced to its size."""
    side = min(image_size, SIZE) // PATCH
    linear = product(1 + side**2, WIDTH, 12 * WIDTH)
    return convolution(3, WIDTH, PATCH, side) + LAYERS * linear + dino_attention(image_size)


def dino_heads_first(image_size: int) -> int:
    """The first convolution of each head on DINO."""
    return READOUTS * product((min(image_size, SIZE) // PATCH) ** 2, WIDTH, WIDTH)


def dino_heads(image_size: int) -> int:
    """The heads on DINO."""
    positions = (min(image_size, SIZE) // PATCH) ** 2
    rest = product(positions, 9 * WIDTH, WIDTH) + product(positions, WIDTH, 1)
    return dino_heads_first(image_size) + READOUTS * rest
