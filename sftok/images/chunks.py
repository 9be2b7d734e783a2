"""Image shards as chunks of decoded images, read and decoded ahead of their use, one shard after the other."""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from infra.store.store import Store
from sftok.images.dataset import ImageRows, StoredImage, stored_images
from sftok.images.decode_ahead import AHEAD, Decoders, SquareDecoder, ahead, batched


class FailedImage(NamedTuple):
    """An image whose bytes do not decode, and why."""

    image_id: str
    reason: str


class Chunk(NamedTuple):
    """Consecutive rows of a shard: the images, and those that are none."""

    rows: ImageRows
    failed: list[FailedImage]


def decoded_chunks(
    folder: Store, name: str, image_size: int, count: int, *, larger_size: int | None = None
) -> Iterator[Chunk]:
    """A shard's images, `count` rows at a time, resized and centre-cropped; what does not decode is told.

    Reading and decoding happen in threads, at most `AHEAD` chunks before the one that is in use. With `larger_size`
    the rows also have the squares of that side that ten crops are cut from.
    """
    sides = (image_size,) if larger_size is None else (image_size, larger_size)
    decoders = Decoders()
    try:
        for _, chunk in decoded_shards(folder, [(name, sides)], count, decoders):
            if chunk is not None:
                yield chunk
    finally:
        decoders.close()


def decoded_shards(
    folder: Store,
    shards: Sequence[tuple[str, Sequence[int]]],
    count: int,
    decoders: SquareDecoder,
) -> Iterator[tuple[int, Chunk | None]]:
    """The images of shards one after the other, as `decoded_chunks` gives them: one is begun before the last one ends.

    Args:
        folder: where the shards are.
        shards: for each its name and the sides of the squares, those of the images first.
        count: rows at a time.
        decoders: decode; where they do it, the squares are.

    Yields:
        The shard's index and a chunk of it, and None at its end.

    Raises:
        ValueError: a file is damaged.
        TransientError: a process that decodes ended.
    """
    waiting: deque[tuple[int, _Decoded | None]] = deque()

    def take() -> tuple[int, Chunk | None]:
        index, decoded = waiting.popleft()
        return index, None if decoded is None else decoded.chunk()

    try:
        for index, rows in ahead(_read(folder, [name for name, _ in shards], count), AHEAD):
            waiting.append((index, None if rows is None else _Decoded(rows, decoders, shards[index][1])))
            while sum(decoded is not None for _, decoded in waiting) > AHEAD or waiting[0][1] is None:
                yield take()
                if not waiting:
                    break
        while waiting:
            yield take()
    finally:
        for _, decoded in waiting:
            if decoded is not None:
                decoded.begun.cancel()


def _read(folder: Store, names: Sequence[str], count: int) -> Iterator[tuple[int, list[StoredImage] | None]]:
    for index, name in enumerate(names):
        for rows in batched(stored_images(folder, name), count):
            yield index, rows
        yield index, None


class _Decoded:
    """Rows whose images are being decoded."""

    def __init__(self, rows: list[StoredImage], decoders: SquareDecoder, sides: Sequence[int]) -> None:
        self.rows, self.begun = rows, decoders.begin([row.data for row in rows], sides)

    def chunk(self) -> Chunk:
        """Wait for the images; those that are none are left out."""
        squares, reasons = self.begun.result()
        told = zip(self.rows, reasons, strict=True)
        failed = [FailedImage(row.image_id, reason) for row, reason in told if reason is not None]
        good = [at for at, reason in enumerate(reasons) if reason is None]
        class_ids = torch.tensor([self.rows[at].class_id for at in good], dtype=torch.int64)
        larger = squares[1] if len(squares) > 1 else None
        return Chunk(ImageRows([self.rows[at].image_id for at in good], squares[0], class_ids, larger=larger), failed)
