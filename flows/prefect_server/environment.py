"""What of the user's environment Prefect answers with a traceback: proxies, certificates, its own settings."""

import contextlib
import io
import os
from collections.abc import Iterator, Sequence

from infra.environment import check_certificates, named

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
HARMLESS = ("PREFECT_API_URL", "PREFECT_API_KEY", "PREFECT_HOME")  # any text will do, or is checked by its use


def check_environment(api_url: str | None) -> None:
    """Refuse variables that Prefect would answer with a traceback; proxies only for a server that is not our own.

    Raises:
        ValueError: one line that names the variable, its value and the remedy.
    """
    check_certificates("SSL_CERT_FILE")
    for name in readable_proxies() if api_url else ():
        raise ValueError(f"{named(name)}: Prefect's client reads it for any server, and cannot; {_remedy(name)}")
    if any(name.startswith("PREFECT_") and name not in HARMLESS for name in os.environ):
        _check_settings()  # takes seconds, as it loads Prefect


def readable_proxies() -> dict[str, str]:
    """Return the proxy variables that httpx, Prefect's client, cannot read, with what it can read of their values.

    It reads all of them whenever a client is made, also those that do not apply to its server.
    """
    found = {}
    for name, value in _each_alone([name for name in os.environ if name.lower() in PROXIES]):
        parts = value.split(",") if name.lower() == "no_proxy" else [value]
        readable = ",".join(part for part in parts if _is_readable(name, part))
        if readable != value:
            found[name] = readable
    return found


def _is_readable(name: str, value: str) -> bool:
    import httpx

    os.environ[name] = value
    try:
        httpx.Client(verify=False).close()  # without certificates, which take time to load
    except (ImportError, ValueError, httpx.InvalidURL):
        return False
    return True


def _remedy(name: str) -> str:
    if name.lower() == "no_proxy":
        return "write hosts with commas between them, IPv6 addresses without brackets"
    return f"{'pip install socksio' if os.environ[name].startswith('socks') else 'write http://host:port'}, or unset it"


def _check_settings() -> None:
    with contextlib.redirect_stderr(io.StringIO()):  # Prefect prints what it also raises
        from prefect.settings import Settings

    try:
        Settings()
    except ValueError as error:
        where, why = "a setting of Prefect's, in its profile or prefect.toml", _reason(error)
    else:
        return
    for name, _ in _each_alone([name for name in os.environ if name.startswith("PREFECT_")]):
        try:
            Settings()
        except ValueError as error:
            where, why = named(name), _reason(error)
    raise ValueError(f"{where}: {why}; correct or unset it")


def _reason(error: ValueError) -> str:
    """Return the first of a validation's errors as a line."""
    errors = getattr(error, "errors", None)
    text = errors(include_url=False)[0]["msg"].partition("\n")[0] if errors else str(error)
    return f"{text[:1].lower()}{text[1:]}"


def _each_alone(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield variables and their values, each while it is the only one of them that is set."""
    given = {name: os.environ.pop(name) for name in names}
    try:
        for name, value in given.items():
            os.environ[name] = value
            yield name, value
            del os.environ[name]
    finally:
        os.environ.update(given)
