"""A store that has no room left, said the same way by a disk and by S3."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)


class StoreFullError(OSError):
    """No space left: a person has to make room, so nobody tries again; what is finished stays and is found later.

    Args:
        code: the error number, ENOSPC or EDQUOT.
        cause: what the disk or the server said.
        place: path or URI of the file that was not written.
    """

    def __init__(self, code: int, cause: str, place: str) -> None:
        super().__init__(code, cause, place)

    def __str__(self) -> str:
        return (
            f"{self.filename}: no space left ({self.strerror}); free some or choose another store; "
            "what is finished is kept"
        )


@contextmanager
def room_at(place: Path) -> Iterator[None]:
    """Tell which file of ours a full disk was met at, instead of the temporary name it had.

    Raises:
        StoreFullError: the disk or the user's share of it is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise StoreFullError(error.errno, error.strerror or "disk full", str(place)) from error
