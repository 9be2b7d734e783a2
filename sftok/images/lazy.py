"""A split of images read on demand: larger than memory, decoded batch by batch, any number of times."""

import hashlib
import heapq
import itertools
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from infra.store.store import Store
from sftok.images.chunks import FailedImage, decoded_chunks
from sftok.images.dataset import ImageRows, Labels, read_labels, read_records
from sftok.images.preprocess import crop, resize_shorter, to_rgb

_BATCH = 64  # images decoded at once by `load`


class LazyImages:
    """Images uint8 (n, 3, S, S), in the order of shards and of image ids within each.

    A few batches and their files are in memory at once, whatever n.
    """

    def __init__(self, store: Store, shards: Mapping[str, int], image_size: int) -> None:
        """Take keys of image Parquet in the store, with the number of rows that the manifest states for each."""
        self.store, self.shards, self.image_size = store, dict(shards), image_size

    def __len__(self) -> int:
        return sum(self.shards.values())

    @property
    def shape(self) -> torch.Size:
        """(n, 3, S, S)."""
        return torch.Size((len(self), 3, self.image_size, self.image_size))

    def __getitem__(self, index: int) -> Tensor:
        """Read one image, and its shard up to it."""
        for key, rows in self.shards.items():
            if index < rows:
                row = next(itertools.islice(read_records(self.store, key), index, None))
                return crop(resize_shorter(to_rgb(row.data), self.image_size), self.image_size)
            index -= rows
        raise IndexError(index)

    def split(self, size: int) -> Iterator[Tensor]:
        """Iterate over all images, at most `size` at once.

        Raises:
            ValueError: a shard has another number of rows than stated, or an image does not decode.
        """
        for batch in self._batches(size):
            yield batch.images

    def labels(self) -> Tensor:
        """Read all class ids int64 (n,), -1: none; eight bytes per image."""
        parts = [torch.tensor(rows.class_ids, dtype=torch.int64) for rows in self._labels()]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)

    def sample(self, count: int, seed: int) -> Tensor:
        """Sample the indices int64 of `count` images, or of all if there are fewer, ordered by image id.

        Chosen by a hash of seed and image id: the same images however they are sharded. Memory grows with `count`.
        """
        ids = itertools.chain.from_iterable(rows.image_ids for rows in self._labels())
        keys = ((hashlib.sha256(f"{seed}\0{name}".encode()).digest(), name, at) for at, name in enumerate(ids))
        chosen = heapq.nsmallest(count, keys)
        return torch.tensor([at for _, _, at in sorted(chosen, key=lambda key: key[1])], dtype=torch.int64)

    def load(self) -> ImageRows:
        """Load all images into memory, sorted by image id across shards."""
        ids = [name for rows in self._labels() for name in rows.image_ids]
        order = torch.tensor(sorted(range(len(ids)), key=ids.__getitem__), dtype=torch.int64)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(ids))
        images = torch.empty(self.shape, dtype=torch.uint8)
        class_ids = torch.empty(len(ids), dtype=torch.int64)
        at = 0
        for batch in self._batches(_BATCH):
            to = place[at : at + len(batch.image_ids)]
            images[to], class_ids[to] = batch.images, batch.class_ids
            at += len(batch.image_ids)
        return ImageRows([ids[row] for row in order.tolist()], images, class_ids)

    def _labels(self) -> Iterator[Labels]:
        return itertools.chain.from_iterable(read_labels(self.store, key) for key in self.shards)

    def _batches(self, size: int) -> Iterator[ImageRows]:
        for key, expected in self.shards.items():
            found = 0
            for chunk in decoded_chunks(self.store, key, self.image_size, size):
                if chunk.failed:
                    reason = _reason(chunk.failed[0])
                    raise ValueError(f"{self.store.uri}/{key}: {reason}; delete its folder and prepare")
                found += len(chunk.rows.image_ids)
                yield chunk.rows
            if found != expected:
                raise ValueError(
                    f"{self.store.uri}/{key} has {found} images, its manifest says {expected}: delete its folder and "
                    "prepare the data again"
                )


def _reason(image: FailedImage) -> str:
    return f"image {image.image_id!r} does not decode ({image.reason})"
