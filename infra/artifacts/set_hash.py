"""A hash of a set that is taken in pieces: in any order, by any number of processes, in memory that does not grow.

Each item is hashed to a number modulo a prime, and the set is the product (Bellare and Micciancio, 1997); the prime and
the width are those of MuHash3072 in Bitcoin Core, with SHAKE-256 for the numbers. Sets are told apart with the strength
of 128 bits, also against someone who chooses the items; one that is put in twice counts twice.
"""

import hashlib
from collections.abc import Iterable

_WIDTH = 384  # bytes
_PRIME = 2 ** (8 * _WIDTH) - 1103717


def of_items(items: Iterable[bytes]) -> int:
    """The product of some items, below 2**3072; 1 for none."""
    product = 1
    for item in items:
        product = product * int.from_bytes(hashlib.shake_256(item).digest(_WIDTH), "big") % _PRIME
    return product


def join(products: Iterable[int]) -> int:
    """The product of sets that are put together."""
    whole = 1
    for product in products:
        whole = whole * product % _PRIME
    return whole


def digest(head: bytes, product: int) -> str:
    """32 hexadecimal digits of what is said about the set, and of its items."""
    return hashlib.sha256(head + product.to_bytes(_WIDTH, "big")).hexdigest()[:32]
