"""Decode images ahead of their use, in threads or processes: the same pixels in the same order either way."""

import contextlib
import itertools
import os
import queue
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from sftok.images.decode import UnreadableImageError, squares
from sftok.images.decode_process import DecodeProcess
from sftok.images.resize_and_crop import Pixels

T = TypeVar("T")

DECODERS = 4  # threads: PIL releases Python's lock while it decodes
AHEAD = 2  # chunks decoded while another one is encoded: this bounds the memory
_GRAIN = 4  # images per task: handing over a task costs a hundredth of decoding an image


class DecodeRequest(NamedTuple):
    """An image to decode, and the memory for its squares."""

    data: bytes
    into: Sequence[Pixels]
    """(3, side, side) each."""
    where: float | None = None
    """position of the squares, as in `decode.squares`."""


class PendingSquares(Protocol):
    """Squares of images that are being decoded."""

    def result(self) -> tuple[list[Tensor], list[str | None]]:
        """Wait for the squares of all files that decode, and the reason of each that does not (None: it does).

        Raises:
            TransientError: a decoding process ended.
        """

    def cancel(self) -> None:
        """Cancel the tasks that have not begun."""


class SquareDecoder(Protocol):
    """Decodes images and cuts their centre squares."""

    def begin(self, files: Sequence[bytes], sides: Sequence[int]) -> PendingSquares:
        """Begin to decode images, to squares of each of these sides: uint8 (n, 3, side, side)."""


class Decoders:
    """Threads that decode images, or that drive a decoding process each if there are enough cores.

    Because of Python's lock 16 threads decode no faster than four, and 16 processes twice as fast (500 x 375 pixels).
    """

    def __init__(self, processes: int = 0, *, is_pinned: bool = False) -> None:
        """Set up the pool; threads and processes start with the first images.

        Args:
            processes: decoding processes; 0 for `DECODERS` threads.
            is_pinned: put the squares of `begin` in pinned memory, from which a GPU copies asynchronously.
        """
        self.processes, self.is_pinned = processes, is_pinned
        self._pool = ThreadPoolExecutor(processes or DECODERS, thread_name_prefix="decode")
        self._started: list[DecodeProcess] = []
        self._idle: queue.SimpleQueue[DecodeProcess] = queue.SimpleQueue()
        self.close = weakref.finalize(self, _close, self._pool, self._started)

    def begin(self, files: Sequence[bytes], sides: Sequence[int]) -> "HostSquares":
        """Begin to decode images and cut their centre squares, in host memory."""
        squares = square_buffers(len(files), sides, is_pinned=self.is_pinned)
        arrays = [square.numpy() for square in squares]
        orders = [DecodeRequest(data, [array[at] for array in arrays]) for at, data in enumerate(files)]
        return HostSquares(squares, self.submit(orders))

    def submit(self, orders: Sequence[DecodeRequest]) -> "PendingDecode":
        """Begin to decode images."""
        parts = [orders[at : at + _GRAIN] for at in range(0, len(orders), _GRAIN)]
        return PendingDecode([self._pool.submit(self._decode, part) for part in parts])

    @property
    def pids(self) -> list[int]:
        """Ids of the processes started so far."""
        return [process.pid for process in self._started]

    def _decode(self, orders: Sequence[DecodeRequest]) -> list[str | None]:
        if not self.processes:
            return [_decode(order) for order in orders]
        with self._process() as process:
            return [process.decode(*order) for order in orders]

    @contextlib.contextmanager
    def _process(self) -> Iterator[DecodeProcess]:
        """Lend a process that no other thread uses meanwhile; there are at most as many processes as threads.

        A process whose answer was not read completely is ended: the rest would be taken for the next image.
        """
        try:
            process = self._idle.get_nowait()
        except queue.Empty:
            process = DecodeProcess()
            self._started.append(process)
        try:
            yield process
        except BaseException:
            process.close()
            self._started.remove(process)
            raise
        self._idle.put(process)


class PendingDecode:
    """Images that are being decoded into given memory."""

    def __init__(self, parts: list[Future[list[str | None]]]) -> None:
        self._parts = parts

    def reasons(self) -> list[str | None]:
        """Wait for all; for each image return why it does not decode, or None.

        Raises:
            TransientError: a decoding process ended.
        """
        return [reason for part in self._parts for reason in part.result()]

    def cancel(self) -> None:
        """Cancel the tasks that have not begun."""
        for part in self._parts:
            part.cancel()


class HostSquares:
    """Squares in host memory that are being filled."""

    def __init__(self, squares: list[Tensor], decoding: PendingDecode) -> None:
        self._squares, self._decoding = squares, decoding

    def result(self) -> tuple[list[Tensor], list[str | None]]:
        """Wait for the squares of all files that decode, and the reason of each that does not (None: it does)."""
        return only_good(self._squares, reasons := self._decoding.reasons()), reasons

    def cancel(self) -> None:
        """Cancel the tasks that have not begun."""
        self._decoding.cancel()


def only_good(squares: list[Tensor], reasons: Sequence[str | None]) -> list[Tensor]:
    """Select the squares of the files that decoded."""
    good = [at for at, reason in enumerate(reasons) if reason is None]
    return squares if len(good) == len(reasons) else [square[good] for square in squares]


def spare_processes(sharers: int = 1, *, cores: int | None = None) -> int:
    """Return how many decoding processes fit if `sharers` share the cores (None: this machine's); 0: use threads."""
    if cores is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return count if (count := cores // sharers - 1) > DECODERS else 0


def square_buffers(count: int, sides: Sequence[int], *, is_pinned: bool = False) -> list[Tensor]:
    """Allocate memory for the squares of `count` images, uint8 (count, 3, side, side) each.

    A GPU copies from pinned memory asynchronously; torch caches freed pinned memory for reuse.
    """
    return [torch.empty((count, 3, side, side), dtype=torch.uint8, pin_memory=is_pinned) for side in sides]


def ahead(items: Iterator[T], count: int) -> Iterator[T]:
    """Iterate over items, with a thread making the next `count` of them meanwhile."""
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:
        waiting: deque[Future[T | object]] = deque(pool.submit(next, items, end) for _ in range(count))
        try:
            while (item := waiting.popleft().result()) is not end:
                waiting.append(pool.submit(next, items, end))
                yield item  # type: ignore[misc]  # it is not `end`
        finally:
            for future in waiting:
                future.cancel()


def batched(items: Iterable[T], count: int) -> Iterator[list[T]]:
    """Group items into lists of `count`, the last of which may be shorter."""
    iterator = iter(items)
    while some := list(itertools.islice(iterator, count)):
        yield some


def _decode(order: DecodeRequest) -> str | None:
    try:
        found = squares(order.data, [square.shape[-1] for square in order.into], order.where)
    except UnreadableImageError as error:
        return str(error)
    for square, pixels in zip(order.into, found, strict=True):
        square[...] = pixels
    return None


def _close(pool: ThreadPoolExecutor, processes: Sequence[DecodeProcess]) -> None:
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.close()
