"""Hide secrets in command lines and URIs: values of secret-like names, and credentials."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

HIDDEN = "***"
SECRET_WORDS = {"secret", "token", "password", "passwd", "pwd", "passphrase", "credential", "credentials", "signature"}
SECRET_WORDS |= {"apikey", "accesskey", "auth", "authorization", "key"}
ASSIGNED = re.compile(r"(?P<name>[A-Za-z][A-Za-z0-9._-]*)(?P<is>\s*[=:]\s*)(?!//)(?P<value>[^\s&;,]+)")
USER_INFO = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)[^/\s]*@")
WORD = re.compile(r"[A-Z]?[a-z0-9]+|[A-Z0-9]+(?![a-z])")


def redact(arguments: Sequence[str]) -> str:
    """Format a command line with *** for the values of secret-like names and for credentials in URIs."""
    kept: list[str] = []
    is_value = False
    for argument in arguments:
        kept.append(HIDDEN if is_value and not argument.startswith("-") else _redacted(argument))
        is_value = argument.startswith("-") and "=" not in argument and _is_secret(argument)
    if kept:
        kept[0] = Path(kept[0]).name
    return shlex.join(kept)


def _redacted(text: str) -> str:
    def hide(match: re.Match[str]) -> str:
        return f"{match['name']}{match['is']}{HIDDEN}" if _is_secret(match["name"]) else match.group()

    return ASSIGNED.sub(hide, USER_INFO.sub(rf"\g<scheme>{HIDDEN}@", text))


def _is_secret(name: str) -> bool:
    """Tell whether a word in the name marks a secret: "hub.token" and "apiToken" do, "num_tokens" does not."""
    return any(word.lower() in SECRET_WORDS for word in WORD.findall(name))
