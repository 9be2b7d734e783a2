"""Hash a multiset incrementally: in any order, by any number of processes, in constant memory.

Each item is hashed to a number modulo a prime, and the set's hash is their product (Bellare and Micciancio, 1997); the
prime and the width are those of MuHash3072 in Bitcoin Core, with SHAKE-256 for the numbers. Collision resistance is 128
bits, even against someone who chooses the items; an item that is added twice counts twice.
"""

import hashlib
from collections.abc import Iterable

_WIDTH = 384  # bytes
_PRIME = 2 ** (8 * _WIDTH) - 1103717


def of_items(items: Iterable[bytes]) -> int:
    """Return the product of the items' hashes, below 2**3072; 1 for no items."""
    product = 1
    for item in items:
        product = product * int.from_bytes(hashlib.shake_256(item).digest(_WIDTH), "big") % _PRIME
    return product


def join(products: Iterable[int]) -> int:
    """Combine the products of several sets into that of their union."""
    whole = 1
    for product in products:
        whole = whole * product % _PRIME
    return whole


def digest(head: bytes, product: int) -> str:
    """Return 32 hexadecimal digits that identify the set and its header."""
    return hashlib.sha256(head + product.to_bytes(_WIDTH, "big")).hexdigest()[:32]
