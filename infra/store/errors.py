"""The error of a full store, the same for a disk and for S3."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)


class StoreFullError(OSError):
    """No space left; never retried, since a person has to free some. Finished work is kept and reused.

    Args:
        code: the error number, ENOSPC or EDQUOT.
        cause: the message of the disk or the server.
        place: path or URI of the file that could not be written.
    """

    def __init__(self, code: int, cause: str, place: str) -> None:
        super().__init__(code, cause, place)

    def __str__(self) -> str:
        return (
            f"{self.filename}: no space left ({self.strerror}); free some or choose another store; "
            "finished work is kept"
        )


@contextmanager
def name_full_disk(place: Path) -> Iterator[None]:
    """Report a full disk with the name of the file being written, not with its temporary name.

    Raises:
        StoreFullError: the disk or the user's quota on it is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise StoreFullError(error.errno, error.strerror or "disk full", str(place)) from error
