"""Entries in listings of a store."""

from typing import NamedTuple


class FileInfo(NamedTuple):
    """A stored file."""

    key: str
    size: int  # bytes
    modified: float  # seconds since 1970


class UnfinishedWrite(NamedTuple):
    """A write that was begun and not finished."""

    key: str
    began: float  # seconds since 1970
    upload: str  # S3's upload id; empty on disk
