"""Sign manifests and reject unsigned or wrongly signed ones, if there is a key in the environment.

`SFTOK_SIGNING_KEY` is a secret shared by publishers and readers. A manifest holds the SHA-256 of every file, so its
signature (HMAC-SHA-256) vouches for all of them; the key itself is never written anywhere.
"""

import hashlib
import hmac
import os

KEY = "SFTOK_SIGNING_KEY"
SHORTEST = 16  # characters


def signature(data: bytes) -> str | None:
    """Sign bytes, in hex; None if there is no key.

    Raises:
        ValueError: the key is too short.
    """
    key = os.environ.get(KEY, "")
    if not key:
        return None
    if len(key) < SHORTEST:
        raise ValueError(
            f"{KEY} has {len(key)} characters: give it at least {SHORTEST}, such as from `openssl rand -hex 32`"
        )
    return hmac.new(key.encode(), data, hashlib.sha256).hexdigest()


def check(data: bytes, found: str | None, what: str) -> None:
    """Check the signature of bytes; without a key nothing is checked.

    Raises:
        ValueError: there is a key, and the signature is missing or wrong.
    """
    expected = signature(data)
    if expected is None:
        return
    if found is None:
        raise ValueError(
            f"{what} is not signed, and {KEY} is set: make it again to sign it, or unset {KEY} to trust it"
        )
    if not hmac.compare_digest(found, expected):
        raise ValueError(f"{what}: its signature does not match {KEY}: it was changed, or signed with another key")
