"""Read image shards as chunks of decoded images, decoded ahead of their use, one shard after the other."""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from infra.store.store import Store
from sftok.images.dataset import ImageRecord, ImageRows, read_records
from sftok.images.decode_ahead import AHEAD, Decoders, SquareDecoder, ahead, batched


class FailedImage(NamedTuple):
    """An image whose bytes do not decode, and the reason."""

    image_id: str
    reason: str


class Chunk(NamedTuple):
    """Consecutive rows of a shard: decoded images, and those that failed to decode."""

    rows: ImageRows
    failed: list[FailedImage]


def decoded_chunks(
    folder: Store, name: str, image_size: int, count: int, *, larger_size: int | None = None
) -> Iterator[Chunk]:
    """Decode a shard's images, `count` rows at a time, resized and centre-cropped; failed ones are listed.

    Threads read and decode at most `AHEAD` chunks ahead of the one in use. With `larger_size` the rows also have the
    squares of that side that ten crops are cut from.
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
    """Decode the images of several shards like `decoded_chunks`, beginning a shard before the last one ends.

    Args:
        folder: folder of the shards.
        shards: name of each, and the sides of its squares, that of the images first.
        count: rows per chunk.
        decoders: decode the images; the squares are on their device.

    Yields:
        The shard's index and a chunk of it, or None at its end.

    Raises:
        ValueError: a file is damaged.
        TransientError: a decoding process ended.
    """
    waiting: deque[tuple[int, _PendingChunk | None]] = deque()

    def next_result() -> tuple[int, Chunk | None]:
        index, decoded = waiting.popleft()
        return index, None if decoded is None else decoded.chunk()

    try:
        for index, rows in ahead(_read(folder, [name for name, _ in shards], count), AHEAD):
            waiting.append((index, None if rows is None else _PendingChunk(rows, decoders, shards[index][1])))
            while sum(decoded is not None for _, decoded in waiting) > AHEAD or waiting[0][1] is None:
                yield next_result()
                if not waiting:
                    break
        while waiting:
            yield next_result()
    finally:
        for _, decoded in waiting:
            if decoded is not None:
                decoded.begun.cancel()


def _read(folder: Store, names: Sequence[str], count: int) -> Iterator[tuple[int, list[ImageRecord] | None]]:
    for index, name in enumerate(names):
        for rows in batched(read_records(folder, name), count):
            yield index, rows
        yield index, None


class _PendingChunk:
    """A chunk whose images are being decoded."""

    def __init__(self, rows: list[ImageRecord], decoders: SquareDecoder, sides: Sequence[int]) -> None:
        self.rows, self.begun = rows, decoders.begin([row.data for row in rows], sides)

    def chunk(self) -> Chunk:
        """Wait for the images; those that failed are listed apart."""
        squares, reasons = self.begun.result()
        results = zip(self.rows, reasons, strict=True)
        failed = [FailedImage(row.image_id, reason) for row, reason in results if reason is not None]
        good = [at for at, reason in enumerate(reasons) if reason is None]
        class_ids = torch.tensor([self.rows[at].class_id for at in good], dtype=torch.int64)
        larger = squares[1] if len(squares) > 1 else None
        return Chunk(ImageRows([self.rows[at].image_id for at in good], squares[0], class_ids, larger=larger), failed)
