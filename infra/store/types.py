"""What listings of a store tell of its files."""

from typing import NamedTuple


class Stored(NamedTuple):
    """A file."""

    key: str
    size: int  # bytes
    modified: float  # seconds since 1970


class Abandoned(NamedTuple):
    """Something that a writer began and did not finish."""

    key: str
    began: float  # seconds since 1970
    upload: str  # how the store calls it; empty on disk
