"""Stream training images that do not fit in memory: read by shards, shuffled within windows, decoded ahead.

Each micro-batch of a step has shards of its own, so a rank reads only the shards of its micro-batches, and the contents
of a micro-batch depend on its number and the step alone: not on ranks, restarts or the machine.
"""

import bisect
import functools
import itertools
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch

from infra.compute.transfer import send
from infra.training.loop import generator_of
from sftok.config import AugmentConfig
from sftok.images.dataset import ImageBatch, ImageRecord, ImageSet, read_records
from sftok.images.decode_ahead import DecodeRequest, Decoders, PendingDecode, square_buffers
from sftok.images.preprocess import augment, to_float, uniforms

WINDOW = 4  # shards whose images are shuffled together: these and the next window's are in memory, undecoded
PREFETCH = 3  # batches of a part decoded ahead
LARGE = 4 * 2**30  # bytes of decoded images above which they are streamed


class SplitShards(NamedTuple):
    """The shards of a split, undecoded in the store."""

    images: ImageSet
    rows: Mapping[str, int]
    """images per shard, as stated by the manifest."""
    image_size: int

    @property
    def is_large(self) -> bool:
        """Whether the images are streamed instead of held decoded: a property of the data, not of the machine."""
        return sum(self.rows.values()) * 3 * self.image_size**2 > LARGE


class StreamedImages:
    """Training batches as a pure function of step and part, like `TrainImages`.

    Every image of a part occurs once per epoch of the part: shards in an order drawn from (seed, part, epoch), and
    images permuted within each window of shards. An image's augmentation is drawn from (seed, part, position). Two
    windows of `WINDOW` shards, undecoded, are in memory for every part that is used.
    """

    def __init__(
        self,
        shards: SplitShards,
        config: AugmentConfig,
        *,
        seed: int,
        batch_size: int,
        parts: int,
        device: str = "cpu",
        decoders: int = 0,
    ) -> None:
        """Divide the shards among parts; neither the decoding processes (0: threads) nor the device change a batch."""
        names = [name for name in sorted(shards.rows) if shards.rows[name]]
        if len(names) < parts:
            raise ValueError(
                f"{len(names)} image shards cannot feed {parts} micro-batches a step: prepare with data.num_shards of "
                f"{parts} at least, or choose a larger micro_batch"
            )
        target = _DecodeTarget(device, Decoders(decoders))
        share = batch_size // parts
        self._parts = [
            _MicroBatchStream(shards, tuple(names[part::parts]), config, (seed, part), share, target)
            for part in range(parts)
        ]

    def batch(self, step: int, part: int) -> ImageBatch:
        """Return micro-batch `part` of a step (from 0), images on the device; the next ones are decoded meanwhile."""
        return self._parts[part].batch(step)


class _Window(NamedTuple):
    """Shards whose images are shuffled together."""

    names: Sequence[str]
    rows: int
    epoch: int
    number: int


class _DecodeTarget(NamedTuple):
    """Device of the images, and the decoders."""

    device: str
    decoders: Decoders


class _PendingBatch(NamedTuple):
    """A batch whose images are being decoded."""

    rows: list[ImageRecord]
    draws: list[tuple[float, ...]]
    images: torch.Tensor
    """uint8 (n, 3, S, S)."""
    decoding: PendingDecode


class _MicroBatchStream:
    """The images of one micro-batch's shards, in order of their positions."""

    def __init__(
        self,
        shards: SplitShards,
        names: tuple[str, ...],
        config: AugmentConfig,
        key: tuple[int, int],
        count: int,
        target: _DecodeTarget,
    ) -> None:
        self.shards, self.names, self.config, self.key, self.count, self.target = (
            shards,
            names,
            config,
            key,
            count,
            target,
        )
        self.total = sum(shards.rows[name] for name in names)
        self._read: dict[tuple[int, int], Future[list[ImageRecord]]] = {}
        self._begun: deque[tuple[int, Future[_PendingBatch]]] = deque()
        self._last: tuple[int, ImageBatch] | None = None
        # Threads start with the first task, so parts of other ranks have none.
        self._reader, self._beginner = ThreadPoolExecutor(1, "stream-read"), ThreadPoolExecutor(1, "stream-begin")

    def batch(self, step: int) -> ImageBatch:
        if self._last is not None and self._last[0] == step:
            return self._last[1]
        if not self._begun or self._begun[0][0] != step:
            self._leave()
        for following in range(step + len(self._begun), step + PREFETCH + 1):
            self._begun.append((following, self._beginner.submit(self._begin, following)))
        begun = self._begun.popleft()[1].result()
        for row, reason in zip(begun.rows, begun.decoding.reasons(), strict=True):
            if reason is not None:
                raise ValueError(f"image {row.image_id!r} does not decode ({reason}): prepare the data again")
        batch = ImageBatch(
            augment(to_float(send(begun.images, self.target.device)), self.config, begun.draws),
            torch.tensor([row.class_id for row in begun.rows], dtype=torch.int64),
            [row.image_id for row in begun.rows],
        )
        self._last = step, batch
        return batch

    def _leave(self) -> None:
        """Cancel the batches begun, since another step is wanted than the next one."""
        for _, begun in self._begun:
            if not begun.cancel():
                begun.result().decoding.cancel()
        self._begun.clear()

    def _begin(self, step: int) -> _PendingBatch:
        """Look up the images of a step and begin to decode them, concurrently with those of earlier steps."""
        positions = range(step * self.count, (step + 1) * self.count)
        rows = [self._row(position) for position in positions]
        draws = [uniforms("train", *self.key, position) for position in positions]
        is_pinned = torch.device(self.target.device).type == "cuda"
        (images,) = square_buffers(self.count, (self.shards.image_size,), is_pinned=is_pinned)
        places = [draw[5] if self.config.crop == "random" else None for draw in draws]
        orders = [
            DecodeRequest(row.data, [square], place)
            for row, square, place in zip(rows, images.numpy(), places, strict=True)
        ]
        return _PendingBatch(rows, draws, images, self.target.decoders.submit(orders))

    def _row(self, position: int) -> ImageRecord:
        epoch, place = divmod(position, self.total)
        windows = _windows(self, epoch)
        ends = list(itertools.accumulate(window.rows for window in windows))
        at = bisect.bisect_right(ends, place)
        window, first = windows[at], ends[at] - windows[at].rows
        order = _permutation(window.rows, (*self.key, "window", epoch, at))
        following = windows[at + 1] if at + 1 < len(windows) else _windows(self, epoch + 1)[0]
        return self._loaded(window, following)[int(order[place - first])]

    def _loaded(self, window: _Window, following: _Window) -> list[ImageRecord]:
        """Return the window's images; the next window's are read meanwhile, earlier ones are dropped."""
        kept = {(w.epoch, w.number): w for w in (window, following)}
        self._read = {key: read for key, read in self._read.items() if key in kept}
        for key, wanted in kept.items():
            if key not in self._read:
                self._read[key] = self._reader.submit(self._images, wanted)
        return self._read[window.epoch, window.number].result()

    def _images(self, window: _Window) -> list[ImageRecord]:
        folder = self.shards.images.folder
        images = [image for name in window.names for image in read_records(folder, name)]
        if len(images) != window.rows:
            raise ValueError(f"{folder.uri}: {len(images)} images in {', '.join(window.names)}, not {window.rows}")
        return images


def _windows(part: _MicroBatchStream, epoch: int) -> tuple[_Window, ...]:
    """Return the windows of an epoch, in order."""
    return _epoch(part.names, tuple(part.shards.rows[name] for name in part.names), part.key, epoch)


@functools.lru_cache(maxsize=64)
def _epoch(names: tuple[str, ...], rows: tuple[int, ...], key: tuple[int, int], epoch: int) -> tuple[_Window, ...]:
    order = _permutation(len(names), (*key, "shards", epoch)).tolist()
    cuts = [order[at : at + WINDOW] for at in range(0, len(order), WINDOW)]
    return tuple(
        _Window([names[i] for i in cut], sum(rows[i] for i in cut), epoch, number) for number, cut in enumerate(cuts)
    )


@functools.lru_cache(maxsize=64)
def _permutation(count: int, key: tuple[int | str, ...]) -> torch.Tensor:
    return torch.randperm(count, generator=generator_of("stream", *key))
