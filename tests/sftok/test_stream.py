"""Streamed training images: every one once an epoch, the same for a step and part whatever was asked before."""

import io
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from infra.store import Store
from sftok.config import AugmentConfig, DataConfig
from sftok.data import ImageBatch, ImageSet
from sftok.prepare import prepare
from sftok.sources import list_source
from sftok.stream import StoredShards, StreamedImages

SIZE, COUNT = 8, 90


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> StoredShards:
    """90 images whose grey tells which they are, in ten shards."""
    folder = tmp_path_factory.mktemp("images")
    for split, count in (("train", COUNT), ("val", 4)):
        for number in range(count):
            place = folder / "source" / split / "class"
            place.mkdir(parents=True, exist_ok=True)
            file = io.BytesIO()
            Image.fromarray(np.full((SIZE, SIZE + 3, 3), number, np.uint8)).save(file, "PNG")
            (place / f"{number:03d}.png").write_bytes(file.getvalue())
    out = Store(folder / "out")
    config = DataConfig(image_size=SIZE, num_shards=10, num_val_shards=1)
    made = prepare(list_source(str(folder / "source"), config), config, out=out)
    images = ImageSet.open(out)
    rows = {entry.path: entry.rows or 0 for entry in made.files}
    return StoredShards(images, {name: rows[name] for name in images.shards("train")}, SIZE)


def stream(shards: StoredShards, parts: int = 2, **changes: object) -> StreamedImages:
    config = AugmentConfig(**{"crop": "center", "flip": False, **changes})  # type: ignore[arg-type]
    return StreamedImages(shards, config, seed=0, batch_size=10, parts=parts)


def greys(batch: ImageBatch) -> list[int]:
    return (batch.images.mean((1, 2, 3)) * 255).round().int().tolist()


def test_every_image_of_a_part_comes_once_an_epoch(shards: StoredShards) -> None:
    images = stream(shards)
    for part in range(2):
        names = [name for name in sorted(shards.rows) if shards.rows[name]][part::2]
        total = sum(shards.rows[name] for name in names)
        seen = [image_id for step in range(3 * total // 5) for image_id in images.batch(step, part).image_ids]
        for epoch in range(2):
            assert max(Counter(seen[epoch * total : (epoch + 1) * total]).values()) == 1
        assert seen[:total] != seen[total : 2 * total]  # another order
        assert len(set(seen)) == total


def test_parts_share_the_images_between_them(shards: StoredShards) -> None:
    images = stream(shards)
    halves = [{i for step in range(12) for i in images.batch(step, part).image_ids} for part in range(2)]
    assert not halves[0] & halves[1]
    assert len(halves[0] | halves[1]) == COUNT


def test_a_batch_is_a_function_of_step_and_part(shards: StoredShards) -> None:
    images = stream(shards, crop="random", flip=True, rotate=10)
    first = [images.batch(step, 1) for step in range(12)]
    again = stream(shards, crop="random", flip=True, rotate=10)
    for step in (11, 3, 0, 7):  # a resume, and any order
        batch = again.batch(step, 1)
        assert batch.image_ids == first[step].image_ids
        assert torch.equal(batch.images, first[step].images)


def test_the_pixels_are_the_images(shards: StoredShards) -> None:
    batch = stream(shards, parts=1).batch(4, 0)
    assert greys(batch) == [int(image_id.split("/")[-1][:3]) for image_id in batch.image_ids]
    assert batch.images.shape == (10, 3, SIZE, SIZE)


def test_what_is_large_depends_on_the_data(shards: StoredShards) -> None:
    assert not shards.is_large
    assert StoredShards(shards.images, {"train": 1_281_167}, 256).is_large


def test_more_parts_than_shards_are_refused(shards: StoredShards) -> None:
    with pytest.raises(ValueError, match="shards cannot feed 11 micro-batches a step"):
        StreamedImages(shards, AugmentConfig(), seed=0, batch_size=11, parts=11)
