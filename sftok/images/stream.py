"""Training images that do not fit into memory: read by shards, mixed within windows of them, decoded ahead.

A step's micro-batches have shards of their own, so a rank reads only the shards of its micro-batches, and what a
micro-batch holds depends on its number and the step alone: not on ranks, restarts or the machine.
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
from sftok.images.dataset import ImageBatch, ImageSet, StoredImage, stored_images
from sftok.images.decode_ahead import Decoders, Decoding, Order, square_buffers
from sftok.images.preprocess import augment, to_float, uniforms

WINDOW = 4  # shards whose images are mixed: as many, and the next window's, are in memory, undecoded
PREFETCH = 3  # batches of a part that are decoded before they are asked for
LARGE = 4 * 2**30  # bytes of decoded images from which on they are streamed


class StoredShards(NamedTuple):
    """The shards of a split, undecoded in the store."""

    images: ImageSet
    rows: Mapping[str, int]
    """images by shard, as the manifest states them."""
    image_size: int

    @property
    def is_large(self) -> bool:
        """Whether they are streamed instead of kept decoded: a property of the data, not of the machine."""
        return sum(self.rows.values()) * 3 * self.image_size**2 > LARGE


class StreamedImages:
    """Training batches as a pure function of step and part, like `TrainImages`.

    Every image of a part comes once in the part's epoch: its shards in an order drawn from (seed, part, epoch), the
    images of each window of them permuted. An image's changes are drawn from (seed, part, position). In memory are two
    windows of `WINDOW` shards, undecoded, for every part that is asked for.
    """

    def __init__(
        self,
        shards: StoredShards,
        config: AugmentConfig,
        *,
        seed: int,
        batch_size: int,
        parts: int,
        device: str = "cpu",
        decoders: int = 0,
    ) -> None:
        """`decoders` are processes, 0 for threads; neither they nor the device change what a batch holds."""
        names = [name for name in sorted(shards.rows) if shards.rows[name]]
        if len(names) < parts:
            raise ValueError(
                f"{len(names)} image shards cannot feed {parts} micro-batches a step: prepare with data.num_shards of "
                f"{parts} at least, or choose a larger micro_batch"
            )
        way = _Way(device, Decoders(decoders))
        share = batch_size // parts
        self._parts = [
            _Part(shards, tuple(names[part::parts]), config, (seed, part), share, way) for part in range(parts)
        ]

    def batch(self, step: int, part: int) -> ImageBatch:
        """Micro-batch `part` of a step (from 0), its images on the device; the next ones are decoded meanwhile."""
        return self._parts[part].batch(step)


class _Window(NamedTuple):
    """Shards whose images are mixed."""

    names: Sequence[str]
    rows: int
    epoch: int
    number: int


class _Way(NamedTuple):
    """How images come to where they are learned from."""

    device: str
    decoders: Decoders


class _Begun(NamedTuple):
    """A batch whose images are being decoded."""

    rows: list[StoredImage]
    draws: list[tuple[float, ...]]
    images: torch.Tensor
    """uint8 (n, 3, S, S)."""
    decoding: Decoding


class _Part:
    """The images of one micro-batch's shards, in order of their positions."""

    def __init__(
        self,
        shards: StoredShards,
        names: tuple[str, ...],
        config: AugmentConfig,
        key: tuple[int, int],
        count: int,
        way: _Way,
    ) -> None:
        self.shards, self.names, self.config, self.key, self.count, self.way = shards, names, config, key, count, way
        self.total = sum(shards.rows[name] for name in names)
        self._read: dict[tuple[int, int], Future[list[StoredImage]]] = {}
        self._begun: deque[tuple[int, Future[_Begun]]] = deque()
        self._last: tuple[int, ImageBatch] | None = None
        # Threads begin with the first task: a part of another rank has none.
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
            augment(to_float(send(begun.images, self.way.device)), self.config, begun.draws),
            torch.tensor([row.class_id for row in begun.rows], dtype=torch.int64),
            [row.image_id for row in begun.rows],
        )
        self._last = step, batch
        return batch

    def _leave(self) -> None:
        """Another step is asked for than the one that was awaited."""
        for _, begun in self._begun:
            if not begun.cancel():
                begun.result().decoding.cancel()
        self._begun.clear()

    def _begin(self, step: int) -> _Begun:
        """Look up the images of a step and have them decoded: beside those of the steps before, not after them."""
        positions = range(step * self.count, (step + 1) * self.count)
        rows = [self._row(position) for position in positions]
        draws = [uniforms("train", *self.key, position) for position in positions]
        is_pinned = torch.device(self.way.device).type == "cuda"
        (images,) = square_buffers(self.count, (self.shards.image_size,), is_pinned=is_pinned)
        places = [draw[5] if self.config.crop == "random" else None for draw in draws]
        orders = [
            Order(row.data, [square], place) for row, square, place in zip(rows, images.numpy(), places, strict=True)
        ]
        return _Begun(rows, draws, images, self.way.decoders.submit(orders))

    def _row(self, position: int) -> StoredImage:
        epoch, place = divmod(position, self.total)
        windows = _windows(self, epoch)
        ends = list(itertools.accumulate(window.rows for window in windows))
        at = bisect.bisect_right(ends, place)
        window, first = windows[at], ends[at] - windows[at].rows
        order = _permutation(window.rows, (*self.key, "window", epoch, at))
        following = windows[at + 1] if at + 1 < len(windows) else _windows(self, epoch + 1)[0]
        return self._loaded(window, following)[int(order[place - first])]

    def _loaded(self, window: _Window, following: _Window) -> list[StoredImage]:
        """The window's images; the next window's are read meanwhile, those before are let go."""
        kept = {(w.epoch, w.number): w for w in (window, following)}
        self._read = {key: read for key, read in self._read.items() if key in kept}
        for key, wanted in kept.items():
            if key not in self._read:
                self._read[key] = self._reader.submit(self._images, wanted)
        return self._read[window.epoch, window.number].result()

    def _images(self, window: _Window) -> list[StoredImage]:
        folder = self.shards.images.folder
        images = [image for name in window.names for image in stored_images(folder, name)]
        if len(images) != window.rows:
            raise ValueError(f"{folder.uri}: {len(images)} images in {', '.join(window.names)}, not {window.rows}")
        return images


def _windows(part: _Part, epoch: int) -> tuple[_Window, ...]:
    """The windows of an epoch, in order."""
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
