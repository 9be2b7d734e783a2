"""Images decoded ahead of their use, in threads or in processes: the same pixels in the same order either way."""

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

from sftok.images.decode import Pixels, UnreadableImageError, squares
from sftok.images.decode_process import DecodeProcess

T = TypeVar("T")

DECODERS = 4  # threads: PIL lets others run while it decodes
AHEAD = 2  # chunks that are decoded while another one is encoded: what bounds the memory
_GRAIN = 4  # images a task: handing one over costs a hundredth of decoding it


class Order(NamedTuple):
    """An image to decode, and where its squares go."""

    data: bytes
    into: Sequence[Pixels]
    """(3, side, side) each."""
    where: float | None = None
    """place of the squares, as of `image_file.squares`."""


class Begun(Protocol):
    """Images that are being decoded."""

    def result(self) -> tuple[list[Tensor], list[str | None]]:
        """Wait for the squares of all that are images, and for each file why it is none, or None.

        Raises:
            TransientError: a process that decodes ended.
        """

    def cancel(self) -> None:
        """Leave out what was not begun."""


class SquareDecoder(Protocol):
    """What decodes images and cuts their centre squares."""

    def begin(self, files: Sequence[bytes], sides: Sequence[int]) -> Begun:
        """Begin to decode images, to squares of each of these sides: uint8 (n, 3, side, side)."""


class Decoders:
    """Threads that decode images: themselves, or by a process each where there are enough cores for it.

    Python's lock lets four threads decode as fast as 16 do, and 16 processes twice as fast (500 x 375 pixels).
    """

    def __init__(self, processes: int = 0, *, is_pinned: bool = False) -> None:
        """Threads and processes start with the first images.

        Args:
            processes: 0 for `DECODERS` threads alone.
            is_pinned: whether `begin` puts squares where a GPU copies from while the host goes on.
        """
        self.processes, self.is_pinned = processes, is_pinned
        self._pool = ThreadPoolExecutor(processes or DECODERS, thread_name_prefix="decode")
        self._started: list[DecodeProcess] = []
        self._idle: queue.SimpleQueue[DecodeProcess] = queue.SimpleQueue()
        self.close = weakref.finalize(self, _close, self._pool, self._started)

    def begin(self, files: Sequence[bytes], sides: Sequence[int]) -> "InMemory":
        """Begin to decode images and cut their centre squares."""
        squares = square_buffers(len(files), sides, is_pinned=self.is_pinned)
        arrays = [square.numpy() for square in squares]
        orders = [Order(data, [array[at] for array in arrays]) for at, data in enumerate(files)]
        return InMemory(squares, self.submit(orders))

    def submit(self, orders: Sequence[Order]) -> "Decoding":
        """Begin to decode images."""
        parts = [orders[at : at + _GRAIN] for at in range(0, len(orders), _GRAIN)]
        return Decoding([self._pool.submit(self._decode, part) for part in parts])

    @property
    def pids(self) -> list[int]:
        """The processes so far."""
        return [process.pid for process in self._started]

    def _decode(self, orders: Sequence[Order]) -> list[str | None]:
        if not self.processes:
            return [_decode(order) for order in orders]
        with self._process() as process:
            return [process.decode(*order) for order in orders]

    @contextlib.contextmanager
    def _process(self) -> Iterator[DecodeProcess]:
        """A process that no other thread asks meanwhile; there are no more of them than threads.

        One whose answer was not read to the end is ended: what it says next would be taken for another image.
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


class Decoding:
    """Images that are being decoded."""

    def __init__(self, parts: list[Future[list[str | None]]]) -> None:
        self._parts = parts

    def reasons(self) -> list[str | None]:
        """Wait for all; for each image why it is none, or None.

        Raises:
            TransientError: a process ended.
        """
        return [reason for part in self._parts for reason in part.result()]

    def cancel(self) -> None:
        """Leave out what was not begun."""
        for part in self._parts:
            part.cancel()


class InMemory:
    """Squares that are being filled."""

    def __init__(self, squares: list[Tensor], decoding: Decoding) -> None:
        self._squares, self._decoding = squares, decoding

    def result(self) -> tuple[list[Tensor], list[str | None]]:
        """Wait for the squares of all that are images, and for each file why it is none, or None."""
        return only_good(self._squares, reasons := self._decoding.reasons()), reasons

    def cancel(self) -> None:
        """Leave out what was not begun."""
        self._decoding.cancel()


def only_good(squares: list[Tensor], reasons: Sequence[str | None]) -> list[Tensor]:
    """The squares of those files for which there is no reason why they are no image."""
    good = [at for at, reason in enumerate(reasons) if reason is None]
    return squares if len(good) == len(reasons) else [square[good] for square in squares]


def spare_processes(sharers: int = 1, *, cores: int | None = None) -> int:
    """Processes that may decode where `sharers` share these cores, None: the machine's; 0 where threads use them up."""
    if cores is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return count if (count := cores // sharers - 1) > DECODERS else 0


def square_buffers(count: int, sides: Sequence[int], *, is_pinned: bool = False) -> list[Tensor]:
    """Memory for the squares of `count` images, uint8 (count, 3, side, side) each.

    Pinned, a GPU copies from it while the host goes on; torch keeps what is let go of for the next ones.
    """
    return [torch.empty((count, 3, side, side), dtype=torch.uint8, pin_memory=is_pinned) for side in sides]


def ahead(items: Iterator[T], count: int) -> Iterator[T]:
    """The items, with the next `count` of them made in a thread meanwhile."""
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
    """Lists of `count` items, the last one of what is left."""
    iterator = iter(items)
    while some := list(itertools.islice(iterator, count)):
        yield some


def _decode(order: Order) -> str | None:
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
