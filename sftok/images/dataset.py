"""Prepared images in memory: rows of image Parquet, and training batches as a function of the step."""

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from infra.artifacts.shards import SHARD, split_of
from infra.compute.transfer import send
from infra.store.store import Store
from sftok.config import AugmentConfig
from sftok.images.contract import METADATA_KEY, NO_CLASS, SPLITS
from sftok.images.preprocess import (
    affine,
    augment,
    crop,
    resize_shorter,
    ten_crop,
    to_float,
    to_rgb,
    uniforms,
    variant_name,
)

_ROWS_READ = 64  # at once
_LABELS_READ = 1 << 14


class ImageBatch(NamedTuple):
    """A training batch: images float32 in [0, 1] (B, 3, H, W), class ids int64 (B,; -1: none), image ids."""

    images: torch.Tensor
    class_ids: torch.Tensor
    image_ids: list[str]


class ImageRows(NamedTuple):
    """Decoded images in memory."""

    image_ids: list[str]
    images: torch.Tensor  # uint8 (n, 3, S, S), resized by the shorter side, centre-cropped
    class_ids: torch.Tensor  # int64 (n,), -1: none
    uncropped: list[torch.Tensor] | None = None  # uint8 (3, H, W) each, shorter side S; random crops are cut from them
    larger: torch.Tensor | None = (
        None  # uint8 (n, 3, L, L), centre squares at shorter side L; ten crops are cut from them
    )


class ImageRecord(NamedTuple):
    """A row of image Parquet, with the bytes of the image file, not decoded."""

    image_id: str
    data: bytes
    class_id: int  # -1: none


class Labels(NamedTuple):
    """Rows of image Parquet without their images."""

    image_ids: list[str]
    class_ids: list[int]  # -1: none


@dataclass(frozen=True)
class ImageSet:
    """The image Parquet of a folder, as written by prepare."""

    folder: Store
    class_names: tuple[str, ...] | None
    names: tuple[str, ...]  # of all shards, sorted

    @classmethod
    def open(cls, folder: Store) -> "ImageSet":
        """Find the shards in a folder.

        Raises:
            ValueError: where shards are missing, by the number that their names tell.
        """
        return cls.of(folder, folder.list())

    @classmethod
    def of(cls, folder: Store, files: Iterable[str]) -> "ImageSet":
        """The shards among the files of a folder, as its manifest or a listing names them.

        Raises:
            ValueError: where shards are missing, by the number that their names tell.
        """
        matches = [match for match in map(SHARD.fullmatch, files) if match]
        for split in SPLITS:
            found = [match for match in matches if match["split"] == split]
            totals = {int(match["total"]) for match in found}
            if len(totals) != 1 or len(found) != totals.pop():
                raise ValueError(
                    f"{folder.uri}: {len(found)} {split} shards are no complete set: prepare the data again"
                )
        names = tuple(sorted(match[0] for match in matches))
        with _open_shard(folder, names[0]) as parquet:
            class_names = json.loads(parquet.schema_arrow.metadata[METADATA_KEY])["class_names"]
        return cls(folder, None if class_names is None else tuple(class_names), names)

    def shards(self, split: str) -> list[str]:
        """List the shards of a split (train or val), sorted by name."""
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is neither train nor val")
        return [name for name in self.names if split_of(name) == split]

    def read_shard(self, name: str, image_size: int, *, crop: Literal["center", "random"] = "center") -> ImageRows:
        """Decode a shard, rows sorted by image id; crop "random" also keeps the uncropped images."""
        image_ids: list[str] = []
        class_ids: list[int] = []
        resized: list[torch.Tensor] = []
        for row in read_records(self.folder, name):
            image_ids.append(row.image_id)
            class_ids.append(row.class_id)
            image = resize_shorter(to_rgb(row.data), image_size)
            resized.append(image if crop == "random" else _center(image, image_size))
        return _rows(image_ids, class_ids, resized, image_size, crop == "random")

    def load(self, split: str, image_size: int, *, crop: Literal["center", "random"] = "center") -> ImageRows:
        """Decode all shards of a split, rows sorted by image id whatever the shards."""
        shards = [self.read_shard(name, image_size, crop=crop) for name in self.shards(split)]
        image_ids = [image_id for rows in shards for image_id in rows.image_ids]
        order = sorted(range(len(image_ids)), key=image_ids.__getitem__)
        index = torch.tensor(order, dtype=torch.int64)
        uncropped = [image for rows in shards for image in rows.uncropped or ()]
        return ImageRows(
            [image_ids[row] for row in order],
            torch.cat([rows.images for rows in shards])[index],
            torch.cat([rows.class_ids for rows in shards])[index],
            [uncropped[row] for row in order] if crop == "random" else None,
        )


def read_records(folder: Store, name: str) -> Iterator[ImageRecord]:
    """Read the rows of a shard, sorted by image id, with few in memory at once.

    Raises:
        ValueError: the file is damaged.
    """
    with _open_shard(folder, name) as parquet:
        for batch in parquet.iter_batches(_ROWS_READ, columns=["image_id", "image", "label"], use_threads=False):
            for row in batch.to_pylist():
                data = (row["image"] or {}).get("bytes") or b""
                yield ImageRecord(row["image_id"], data, NO_CLASS if row["label"] is None else row["label"])


def read_labels(folder: Store, name: str) -> Iterator[Labels]:
    """Read the image ids and classes of a shard in its order, some thousands at once, without the images.

    Raises:
        ValueError: the file is damaged.
    """
    with _open_shard(folder, name) as parquet:
        for batch in parquet.iter_batches(_LABELS_READ, columns=["image_id", "label"], use_threads=False):
            yield Labels(batch["image_id"].to_pylist(), batch["label"].fill_null(NO_CLASS).to_pylist())


@contextmanager
def _open_shard(folder: Store, name: str) -> Iterator[pq.ParquetFile]:
    """Open a shard; damage found while it is read raises ValueError, too."""
    try:
        with folder.open(name) as file, pq.ParquetFile(file) as parquet:
            yield parquet
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, ConnectionError) or getattr(error, "errno", None) is not None:
            raise  # an error of the store, not of the file
        said = " ".join(str(error).split())
        raise ValueError(f"{folder.uri}/{name} is no image Parquet ({said}); delete the folder and prepare") from error


class TrainImages:
    """Training batches as a pure function of the step: no state to save, independent of ranks and restarts.

    Every image occurs once per epoch, in an order drawn from (seed, epoch); batches may span two epochs. The
    augmentation of an image is drawn from (seed, position), its position in the sequence of all images, never from its
    batch.
    """

    def __init__(self, rows: ImageRows, augment: AugmentConfig, *, seed: int, batch_size: int) -> None:
        if not rows.image_ids:
            raise ValueError("there are no training images")
        if augment.crop == "random" and rows.uncropped is None:
            raise ValueError('augment.crop = "random" needs images loaded with crop="random"; or set it to "center"')
        self.rows, self.augment, self.seed, self.batch_size = rows, augment, seed, batch_size

    def batch(self, step: int, *, rank: int = 0, ranks: int = 1, device: str = "cpu") -> ImageBatch:
        """Make the batch of a step (from 0), or one rank's equal slice of it.

        Its images are augmented on `device`, without waiting for the device.
        """
        if self.batch_size % ranks:
            raise ValueError(f"batch_size = {self.batch_size} does not divide by {ranks} ranks")
        share = self.batch_size // ranks
        first = step * self.batch_size + rank * share
        positions = range(first, first + share)
        indices = [self._index(position) for position in positions]
        draws = [uniforms("train", self.seed, position) for position in positions]
        return ImageBatch(
            augment(to_float(send(self._cropped(indices, draws), device)), self.augment, draws),
            self.rows.class_ids[indices],
            [self.rows.image_ids[index] for index in indices],
        )

    def _index(self, position: int) -> int:
        epoch, place = divmod(position, len(self.rows.image_ids))
        return int(_permutation(len(self.rows.image_ids), self.seed, epoch)[place])

    def _cropped(self, indices: Sequence[int], draws: Sequence[Sequence[float]]) -> torch.Tensor:
        if self.augment.crop == "center" or self.rows.uncropped is None:
            return self.rows.images[indices]
        size = self.rows.images.shape[-1]
        wholes = [self.rows.uncropped[index] for index in indices]
        return torch.stack([crop(image, size, draw[5]) for image, draw in zip(wholes, draws, strict=True)])


def variant_images(rows: ImageRows, variant: str, augment: AugmentConfig) -> torch.Tensor:
    """Make one view (center, flip, affine-K, crop-K) of every row, float32 in [0, 1] (n, 3, S, S).

    A function of image, image id, variant and `augment` alone, independent of the other rows.

    Raises:
        ValueError: the variant is unknown, it is affine and `augment` allows no affine change, or it is a crop and the
            rows were decoded without their larger squares.
    """
    kind, number = variant_name(variant)
    if kind == "crop":
        if rows.larger is None:
            raise ValueError(f"variant {variant!r} is cut from a larger square: decode the images with larger_size")
        return to_float(ten_crop(rows.larger, rows.images.shape[-1], number))
    images = to_float(rows.images)
    if kind == "flip":
        return images.flip(-1)
    if kind == "affine":
        if not augment.is_affine:
            raise ValueError(
                f"variant {variant!r} would equal center: set augment.rotate, augment.shift or augment.zoom"
            )
        return affine(images, augment, [uniforms("affine", number, image_id) for image_id in rows.image_ids])
    return images


@functools.lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> torch.Tensor:
    """Draw the order of an epoch."""
    key = hashlib.sha256(f"epoch\0{seed}\0{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)
    return torch.randperm(count, generator=generator)


def _center(image: torch.Tensor, size: int) -> torch.Tensor:
    return crop(image, size)


def _rows(image_ids: list[str], class_ids: list[int], resized: list[torch.Tensor], size: int, keep: bool) -> ImageRows:
    images = torch.empty((len(resized), 3, size, size), dtype=torch.uint8)
    for row, image in enumerate(resized):
        images[row] = crop(image, size)
    return ImageRows(image_ids, images, torch.tensor(class_ids, dtype=torch.int64), resized if keep else None)
