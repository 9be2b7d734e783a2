"""Entries in listings of a store."""

from typing import NamedTuple


class FileInfo(NamedTuple):
    """A file or folder, with what is known without opening it."""

    key: str  # ends with / if it is a folder
    size: int = 0  # bytes
    modified: float = 0.0  # seconds since 1970
    version: str = ""  # changes with the contents: modification time in ns, or etag
    problem: str | None = None  # reason why it cannot be read

    @property
    def is_folder(self) -> bool:
        """Tell whether it is a folder."""
        return self.key.endswith("/")

    @property
    def name(self) -> str:
        """The last part of the key, without /."""
        return self.key.removesuffix("/").rpartition("/")[2]


class UnfinishedWrite(NamedTuple):
    """A write that was begun and not finished."""

    key: str
    began: float  # seconds since 1970
    upload: str  # S3's upload id; empty on disk
