"""The hash of a set does not depend on order or pieces, and differs for any other set."""

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from infra.artifacts import set_hash

PRIME = 2**3072 - 1103717
ITEMS = st.lists(st.binary(max_size=8), max_size=12)


@given(items=ITEMS, cut=st.integers(0, 12), random=st.randoms())
def test_order_and_pieces_change_nothing(items, cut, random) -> None:
    whole = set_hash.of_items(items)
    shuffled = random.sample(items, len(items))
    pieces = [set_hash.of_items(shuffled[:cut]), set_hash.of_items(shuffled[cut:])]
    assert set_hash.join(pieces) == whole == set_hash.join(reversed(pieces))


@given(one=ITEMS, other=ITEMS)
def test_other_items_make_another_hash(one, other) -> None:
    assert (set_hash.of_items(one) == set_hash.of_items(other)) == (sorted(one) == sorted(other))


def test_it_is_the_product_that_the_docstring_states() -> None:
    """Pins the definition for other programs: the prime of MuHash3072, numbers by SHAKE-256, both big-endian."""
    numbers = [int.from_bytes(hashlib.shake_256(item).digest(384), "big") for item in (b"a", b"b")]
    product = numbers[0] * numbers[1] % PRIME
    assert set_hash.of_items([b"a", b"b"]) == product
    assert set_hash.digest(b"head", product) == hashlib.sha256(b"head" + product.to_bytes(384, "big")).hexdigest()[:32]
    assert set_hash.of_items([]) == set_hash.join([]) == 1
    assert set_hash.of_items([b"a", b"a"]) != set_hash.of_items([b"a"])
    assert pow(3, PRIME - 1, PRIME) == 1, "Fermat: hardly a prime otherwise"
