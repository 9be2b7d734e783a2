"""SplitMix64 (Steele et al. 2014) in torch's integers: numbers as a pure function of a counter, equal on all devices.

The output for `key + n * INCREMENT`, n = 1, 2, ..., is the n-th number of the sequence that begins at a key.
"""

from torch import Tensor

INCREMENT = 0x9E3779B97F4A7C15 - 2**64  # int64 in place of uint64, as everywhere here
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
_SHIFTS = (30, 27, 31)


def splitmix(state: Tensor) -> Tensor:
    """Compute the output for a state, in place; integers wrap, as the algorithm requires."""
    for shift, multiplier in zip(_SHIFTS[:2], _MULTIPLIERS, strict=True):
        state.bitwise_xor_(shifted(state, shift)).mul_(multiplier)
    return state.bitwise_xor_(shifted(state, _SHIFTS[2]))


def signed(value: int) -> int:
    """Wrap an integer to the range of int64."""
    return (value + 2**63) % 2**64 - 2**63


def shifted(x: Tensor, bits: int) -> Tensor:
    """Shift right as an unsigned integer."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)
