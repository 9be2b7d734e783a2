"""Name environment variables in errors, without credentials, and check those that name files of certificates."""

import os
import ssl


def named(variable: str) -> str:
    """Format a variable as NAME = value; of an address with credentials, only what follows them."""
    scheme, colon, address = os.environ[variable].rpartition("://")
    user, at, host = address.rpartition("@")
    return f"{variable} = {scheme}{colon}{'***@' if at else user}{host}"


def check_certificates(variable: str) -> None:
    """Refuse a variable that names no file of certificates.

    Raises:
        ValueError: naming the variable, its value and the remedy.
    """
    if file := os.environ.get(variable):
        try:
            ssl.create_default_context(cafile=file)
        except OSError as error:
            why = "holds no certificates" if isinstance(error, ssl.SSLError) else error.strerror
            raise ValueError(f"{named(variable)}: {why}; name a file of PEM certificates, or unset it") from None
