"""Name the variable that keeps S3 from being reached: botocore names none, or says that the server does not answer."""

import os
import re
from pathlib import Path
from urllib.parse import urlsplit

from infra.environment import check_certificates, named

ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
FILES = ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE")
PROXY = re.compile(r"(https?://)?([^/\s]*@)?[^/:@\s]+(:\d+)?/?")
SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN")
REMEDIES = dict.fromkeys(ENDPOINTS, "write http://host:port or https://host") | {
    "AWS_CONFIG_FILE": "correct that file",
    "AWS_SHARED_CREDENTIALS_FILE": "correct that file",
    "AWS_PROFILE": "name a profile of ~/.aws/config",
    "AWS_DEFAULT_REGION": "name a region such as us-east-1",
}


def check_environment(uri: str) -> None:
    """Refuse files that cannot be read, and a proxy that is none, before S3 is called for an object.

    Raises:
        ValueError: one line that names the object, the variable, its value and the remedy.
    """
    endpoint = next(filter(None, map(os.environ.get, ENDPOINTS)), "https://s3.amazonaws.com")
    try:
        check_certificates("AWS_CA_BUNDLE")
        for name in filter(os.environ.get, FILES):
            _check_file(name)
        if (proxy := proxy_of(endpoint)) and not PROXY.fullmatch(os.environ[proxy]):
            raise ValueError(f"{named(proxy)}: S3's client has no such proxies; write http://host:port, or unset it")
    except ValueError as error:
        raise ValueError(f"{uri}: {error}") from None


def _check_file(name: str) -> None:
    try:
        Path(os.path.expandvars(os.environ[name])).expanduser().open("rb").close()
    except FileNotFoundError:
        pass  # as for AWS's own tools
    except OSError as error:
        raise ValueError(f"{named(name)}: {error.strerror}; name a file that can be read, or unset it") from None


def proxy_of(endpoint: str) -> str | None:
    """Return the name of the variable whose proxy is used for an endpoint."""
    from botocore.utils import should_bypass_proxies

    variable = f"{urlsplit(endpoint).scheme}_proxy"
    found = [name for name in (variable, variable.upper()) if os.environ.get(name)]
    return found[0] if found and not should_bypass_proxies(endpoint) else None


def blamed(error: Exception) -> str:
    """Name the variable whose value an error cites; other texts are not told, since they may hold secrets."""
    values = {name: value for name, value in os.environ.items() if name.startswith("AWS_") and name not in SECRETS}
    cited = [name for name, value in values.items() if re.search(rf"(?<!\w){re.escape(value)}(?!\w)", str(error))]
    name, kind = max(cited, key=lambda name: len(values[name]), default=""), type(error).__name__
    if not name:
        return f"{kind}; check the AWS settings"
    return f"{named(name)}: S3's client refuses it ({kind}); {REMEDIES.get(name, 'correct it')}"
