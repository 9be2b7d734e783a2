"""Counter-based noise: a pure function of an image's key, the index of the draw and the position in it.

The generator has no state, so an image's noise does not depend on its batch, and CPUs and GPUs draw the same integers;
their logarithms may differ in the last bit. The generator is SplitMix64 (Steele et al. 2014): the outputs for a key are
the keys of its draws, and the outputs for those are the numbers.

Shapes: B images.
"""

import math

import torch
from torch import Tensor

from infra.compute.splitmix import INCREMENT, shifted, signed, splitmix

_BITS = 23  # of a uniform number plus a half, which float32 holds exactly: never 0, never 1


def gumbel(keys_B: Tensor, draw: int, shape: tuple[int, ...]) -> Tensor:
    """Draw standard Gumbel noise (B, *shape) float32, on the keys' device.

    Args:
        keys_B: int64, one per image.
        draw: from 0; each is independent of the others.
        shape: of an image's noise.
    """
    count = math.prod(shape)
    draw_B = splitmix(keys_B + signed((draw + 1) * INCREMENT))
    places_N = torch.arange(1, count + 1, device=keys_B.device) * INCREMENT
    # On CPUs one image at a time, so that its numbers stay in the cache.
    parts = draw_B.split(1 if keys_B.device.type == "cpu" else len(draw_B))
    return torch.cat([_gumbel_of(splitmix(part[:, None] + places_N)) for part in parts]).view(-1, *shape)


def _gumbel_of(bits: Tensor) -> Tensor:
    uniform = shifted(bits, 64 - _BITS).float().add_(0.5).mul_(2.0**-_BITS)
    return uniform.log_().neg_().log_().neg_()
