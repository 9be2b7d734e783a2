"""Locations of folders and files as people write them: a path, file:///path, or s3://bucket/prefix."""

import os
import re
from typing import NamedTuple
from urllib.parse import unquote

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]")


class Location(NamedTuple):
    """A folder or file on this machine or in a bucket."""

    bucket: str  # empty: on this machine
    path: str  # absolute; in a bucket without / at its ends

    @property
    def uri(self) -> str:
        """The path or s3:// URI."""
        return f"s3://{self.bucket}/{self.path}".rstrip("/") if self.bucket else self.path

    @property
    def prefix(self) -> str:
        """The beginning of the keys below it in the bucket; empty on this machine."""
        return f"{self.path}/" if self.bucket and self.path else ""


def parse_location(text: str, what: str = "store", wanted: str = "a folder or s3://bucket/prefix") -> Location:
    """Parse a path or URI; nothing is contacted.

    Args:
        text: "dir", "~/dir", "file:///dir" or "s3://bucket/prefix".
        what: names in errors what is there.
        wanted: names in errors what to give instead.

    Raises:
        ValueError: it is empty, of another kind, on another machine, or contains credentials.
    """
    if not text.strip():
        raise ValueError(f"{what}: the location is empty; give {wanted}")
    match = SCHEME.match(text)
    scheme = match[1].lower() if match else ""
    host, _, path = text[match.end() :].partition("/") if match else ("", "", text)
    shown = f"{what} {scheme}://{host.rpartition('@')[2]}"
    if scheme == "s3":
        if "@" in host:
            raise ValueError(
                f"{shown}: credentials do not belong in a URI; "
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE"
            )
        if not _BUCKET.fullmatch(host):
            raise ValueError(
                f"{shown}: not a bucket name (3 to 63 lowercase letters, digits, dashes); write s3://bucket/prefix"
            )
        return Location(host, path.strip("/"))
    if scheme == "file":
        if host not in ("", "localhost"):
            raise ValueError(f"{shown}/...: a folder on another machine; write file:///folder")
        path = unquote(f"/{path}")
    elif scheme:
        raise ValueError(f"{what} {scheme}://...: neither a local path nor on S3; give {wanted}")
    return Location("", os.path.abspath(os.path.expanduser(path)))
