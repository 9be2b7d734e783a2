"""A process that decodes images for another one, outside its Python lock; it needs no torch, so it starts at once.

They communicate through a socket pair, one image at a time, with pixels read straight into the caller's memory. The
sockets have no name that could be left behind, and the process ends when the other end is closed for whatever reason.
The protocol, in network byte order:

    request    sides (u16), bytes of the file (u32), position (f64, NaN: the centre), each side (u32), the file
    response   bytes of the reason if there is no image (u32, 0: there is one), then the reason or the squares
"""

import contextlib
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import warnings
from collections.abc import Sequence

import numpy as np

from infra.errors import TransientError
from sftok.images.decode import UnreadableImageError, squares
from sftok.images.resize_and_crop import Pixels

_REQUEST, _LENGTH = struct.Struct("!HId"), struct.Struct("!I")


class DecodeProcess:
    """A decoding process; for one thread at a time."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno())],
                env={**os.environ, "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        self._socket = ours

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def decode(self, data: bytes, into: Sequence[Pixels], where: float | None = None) -> str | None:
        """Fill squares (3, side, side) with an image as `squares` cuts them; return the reason if it does not decode.

        Raises:
            TransientError: the process ended.
        """
        sides = [square.shape[-1] for square in into]
        head = _REQUEST.pack(len(sides), len(data), math.nan if where is None else where)
        try:
            self._socket.sendall(head + struct.pack(f"!{len(sides)}I", *sides) + data)
            (length,) = _LENGTH.unpack(_read(self._socket, _LENGTH.size))
            if length:
                return _read(self._socket, length).decode()
            for square in into:
                _fill(self._socket, square.data.cast("B"))
        except (EOFError, OSError) as error:
            raise TransientError(
                f"a process that decodes images {self._end()}; if memory ran out, use fewer"
            ) from error
        return None

    def close(self) -> None:
        """End the process."""
        self._socket.close()
        self._process.kill()
        self._process.wait()

    def _end(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(5)
            return f"was ended by signal {-code}" if code < 0 else f"ended with status {code}"
        return "does not answer"


def main(descriptor: int) -> None:
    """Answer requests until the other end is closed."""
    # The caller gets these signals, too, and its end ends this process.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    warnings.simplefilter("ignore")  # about large images: prepare has warned of them
    with socket.socket(fileno=descriptor) as asked, contextlib.suppress(EOFError, ConnectionError):
        while True:
            _answer(asked)


def _answer(asked: socket.socket) -> None:
    count, length, place = _REQUEST.unpack(_read(asked, _REQUEST.size))
    sides = struct.unpack(f"!{count}I", _read(asked, 4 * count))
    data = _read(asked, length)
    try:
        found = squares(data, sides, None if math.isnan(place) else place)
    except UnreadableImageError as error:
        reason = str(error).encode() or b"it cannot be decoded"
        asked.sendall(_LENGTH.pack(len(reason)) + reason)
        return
    asked.sendall(b"".join([_LENGTH.pack(0), *(np.ascontiguousarray(square).tobytes() for square in found)]))


def _read(source: socket.socket, length: int) -> bytes:
    data = bytearray(length)
    _fill(source, memoryview(data))
    return bytes(data)


def _fill(source: socket.socket, room: memoryview) -> None:
    """Read until `room` is full.

    Raises:
        EOFError: the other end was closed before.
    """
    while room:
        count = source.recv_into(room, flags=socket.MSG_WAITALL)
        if not count:
            raise EOFError
        room = room[count:]


if __name__ == "__main__":
    main(int(sys.argv[1]))
