"""The key-value cache of an autoregressive generator: what attention has seen of the codes drawn so far.

Shapes: B sequences, N codes per sequence, H heads, D channels per head.
"""

from typing import NamedTuple

from torch import Tensor


class Cache(NamedTuple):
    """Key-value cache of static size.

    One tensor per layer: from a single tensor for all layers, a compiled step would copy the whole at each layer.
    """

    keys: tuple[Tensor, ...]
    """(B, H, N, D) per layer."""
    values: tuple[Tensor, ...]
    """(B, H, N, D) per layer."""

    @classmethod
    def empty(cls, shape: tuple[int, ...], layers: int, *, like: Tensor) -> "Cache":
        """Allocate a cache of zeros, (B, H, N, D) per layer, of the type and on the device of `like`."""
        keys, values = (tuple(like.new_zeros(shape) for _ in range(layers)) for _ in range(2))
        return cls(keys, values)


def check_cache(cache: Cache, batch: int, num_tokens: int) -> None:
    """Check a cache's sizes.

    Raises:
        ValueError: the cache has other sizes; names both.
    """
    expected, actual = (batch, num_tokens), cache.keys[0].shape[::2]
    if actual != expected:
        raise ValueError(
            f"the cache holds {actual[0]} sequences of {actual[1]} codes, not {expected[0]} of {expected[1]}: make it "
            f"with empty_cache({expected[0]})"
        )
