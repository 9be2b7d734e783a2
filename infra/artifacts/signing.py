"""Signed manifests: with a key in the environment, what others wrote into the store is refused.

`SFTOK_SIGNING_KEY` is a secret that whoever publishes and whoever reads share. A manifest names the SHA-256 of every
file, so its signature (HMAC-SHA-256) vouches for all of them; the key is never written anywhere.
"""

import hashlib
import hmac
import os

KEY = "SFTOK_SIGNING_KEY"
SHORTEST = 16  # characters


def signature(data: bytes) -> str | None:
    """The signature of some bytes in hex; None where there is no key.

    Raises:
        ValueError: the key is too short.
    """
    key = os.environ.get(KEY, "")
    if not key:
        return None
    if len(key) < SHORTEST:
        raise ValueError(
            f"{KEY} has {len(key)} characters: give it {SHORTEST} at least, such as of `openssl rand -hex 32`"
        )
    return hmac.new(key.encode(), data, hashlib.sha256).hexdigest()


def check(data: bytes, found: str | None, what: str) -> None:
    """Compare a signature with that of some bytes; where there is no key, nothing is compared.

    Raises:
        ValueError: there is a key, and the signature is missing or another one.
    """
    expected = signature(data)
    if expected is None:
        return
    if found is None:
        raise ValueError(
            f"{what} is not signed, and {KEY} is set: sign it by making it again, or unset {KEY} to trust it"
        )
    if not hmac.compare_digest(found, expected):
        raise ValueError(f"{what}: its signature is not that of {KEY}: it was changed, or signed with another key")
