"""Streamed training images: every one once an epoch, the same for a step and part whatever was asked before."""

import io
import json
import threading
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import Image

from infra.progress import Progress, silent
from infra.store.store import Store
from infra.training.loop import TrainingRun
from sftok.config import NO_ADVERSARY, AugmentConfig, DataConfig, TeacherStageConfig
from sftok.images.dataset import ImageBatch, ImageRows, ImageSet, TrainImages
from sftok.images.decode_ahead import DecodeRequest, Decoders, PendingDecode
from sftok.images.stream import PREFETCH, SplitShards, StreamedImages
from sftok.prepare.prepare import prepare
from sftok.sources.sources import list_source
from sftok.training.common import TrainingImages
from sftok.training.teacher import train_teacher
from tests.support.tiny_tokenizer import TEACHER, training

SIZE, COUNT = 8, 90


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> SplitShards:
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
    return SplitShards(images, {name: rows[name] for name in images.shards("train")}, SIZE)


def stream(shards: SplitShards, parts: int = 2, **changes: object) -> StreamedImages:
    config = AugmentConfig(**{"crop": "center", "flip": False, **changes})  # type: ignore[arg-type]
    return StreamedImages(shards, config, seed=0, batch_size=10, parts=parts)


def greys(batch: ImageBatch) -> list[int]:
    return (batch.images.mean((1, 2, 3)) * 255).round().int().tolist()


def test_every_image_of_a_part_comes_once_an_epoch(shards: SplitShards) -> None:
    images = stream(shards)
    for part in range(2):
        names = [name for name in sorted(shards.rows) if shards.rows[name]][part::2]
        total = sum(shards.rows[name] for name in names)
        seen = [image_id for step in range(3 * total // 5) for image_id in images.batch(step, part).image_ids]
        for epoch in range(2):
            assert max(Counter(seen[epoch * total : (epoch + 1) * total]).values()) == 1
        assert seen[:total] != seen[total : 2 * total]  # another order
        assert len(set(seen)) == total


def test_batches_are_begun_ahead_and_not_one_after_the_other(
    shards: SplitShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the first batch three more are begun, although none of them is decoded."""
    images = stream(shards, parts=1)
    decoders, held, begun = images._parts[0].target.decoders, threading.Event(), []

    def waiting(orders: Sequence[DecodeRequest]) -> PendingDecode:
        begun.append(len(orders))
        if len(begun) == 1 + PREFETCH:
            held.set()
        decoding = Decoders.submit(decoders, orders)
        monkeypatch.setattr(decoding, "reasons", lambda: held.wait(20) and PendingDecode.reasons(decoding))
        return decoding

    monkeypatch.setattr(decoders, "submit", waiting)
    assert len(images.batch(0, 0).image_ids) == 10
    assert held.is_set()
    assert begun == [10] * (1 + PREFETCH)
    images.batch(1, 0)
    images.batch(5, 0)  # elsewhere: what was begun is left
    assert images.batch(5, 0).image_ids == stream(shards, parts=1).batch(5, 0).image_ids


def test_processes_that_decode_change_nothing(shards: SplitShards) -> None:
    config = AugmentConfig(crop="random", flip=True, rotate=10)
    several = StreamedImages(shards, config, seed=0, batch_size=10, parts=2, decoders=2)
    alone = stream(shards, crop="random", flip=True, rotate=10)
    for step, part in ((0, 0), (0, 1), (1, 0), (7, 1)):
        assert torch.equal(several.batch(step, part).images, alone.batch(step, part).images)


def test_an_image_that_does_not_decode_is_named(shards: SplitShards, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sftok.images.decode_ahead._decode", lambda order: "it is torn")
    with pytest.raises(
        ValueError, match=r"^image 'train/class/\d+\.png' does not decode \(it is torn\): prepare the data"
    ):
        stream(shards).batch(0, 0)


@pytest.mark.gpu
def test_batches_on_a_gpu_are_those_of_the_cpu(shards: SplitShards) -> None:
    config = AugmentConfig(crop="random", flip=True)
    on_gpu = StreamedImages(shards, config, seed=0, batch_size=10, parts=2, device="cuda", decoders=2)
    on_cpu = StreamedImages(shards, config, seed=0, batch_size=10, parts=2)
    rows = shards.images.load("train", SIZE, crop="random")
    kept = TrainImages(rows, config, seed=0, batch_size=10)
    for step in range(12):
        batch = on_gpu.batch(step, 1)
        assert batch.images.is_cuda
        assert torch.equal(batch.images.cpu(), on_cpu.batch(step, 1).images)
        assert torch.equal(kept.batch(step, device="cuda").images.cpu(), kept.batch(step).images)


def test_parts_share_the_images_between_them(shards: SplitShards) -> None:
    images = stream(shards)
    halves = [{i for step in range(12) for i in images.batch(step, part).image_ids} for part in range(2)]
    assert not halves[0] & halves[1]
    assert len(halves[0] | halves[1]) == COUNT


def test_a_batch_is_a_function_of_step_and_part(shards: SplitShards) -> None:
    images = stream(shards, crop="random", flip=True, rotate=10)
    first = [images.batch(step, 1) for step in range(12)]
    again = stream(shards, crop="random", flip=True, rotate=10)
    for step in (11, 3, 0, 7):  # a resume, and any order
        batch = again.batch(step, 1)
        assert batch.image_ids == first[step].image_ids
        assert torch.equal(batch.images, first[step].images)


def test_the_pixels_are_the_images(shards: SplitShards) -> None:
    batch = stream(shards, parts=1).batch(4, 0)
    assert greys(batch) == [int(image_id.split("/")[-1][:3]) for image_id in batch.image_ids]
    assert batch.images.shape == (10, 3, SIZE, SIZE)


def test_what_is_large_depends_on_the_data(shards: SplitShards) -> None:
    assert not shards.is_large
    assert SplitShards(shards.images, {"train": 1_281_167}, 256).is_large


def test_more_parts_than_shards_are_refused(shards: SplitShards) -> None:
    with pytest.raises(ValueError, match="shards cannot feed 11 micro-batches a step"):
        StreamedImages(shards, AugmentConfig(), seed=0, batch_size=11, parts=11)


def train(shards: SplitShards, folder: Store, steps: int, progress: Progress = silent, **changes: object) -> None:
    config = TeacherStageConfig(
        model=TEACHER,
        training=training(steps, batch_size=8, micro_batch=4, **changes),
        restart_every=2,
        perceptual_weight=0,
        adversarial=NO_ADVERSARY,
    )
    held_out = ImageRows(["a"] * 4, torch.zeros(4, 3, SIZE, SIZE, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))
    images = TrainingImages(shards, held_out, AugmentConfig(crop="random", flip=True))
    run = TrainingRun(folder, seed=0, progress=progress)
    train_teacher(images, config, run=run, weights=lambda config, what: b"")


def test_a_stage_learns_from_a_stream_and_resumes_bit_for_bit(shards: SplitShards, store: Store) -> None:
    whole, parts = store.at("whole"), store.at("parts")
    train(shards, whole, 24)

    def stop(done: int, total: int, figures: object) -> None:
        if done == 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(shards, parts, 24, stop, checkpoint_every=10)
    train(shards, parts, 24, checkpoint_every=10)
    assert parts.read("log.jsonl") == whole.read("log.jsonl")
    assert parts.read("model.safetensors") == whole.read("model.safetensors")
    errors = [json.loads(line)["mse"] for line in whole.read("log.jsonl").decode().splitlines()]
    assert errors[-1] < 0.7 * errors[0]


def test_what_is_large_is_streamed_and_what_is_not_is_kept(
    shards: SplitShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shards.images.folder
    rows = {name: shards.rows.get(name, 4) for name in shards.images.names}
    assert isinstance(TrainingImages.open(folder, rows, SIZE, AugmentConfig()).train, ImageRows)
    monkeypatch.setattr("sftok.images.stream.LARGE", 1000)
    opened = TrainingImages.open(folder, rows, SIZE, AugmentConfig())
    assert isinstance(opened.train, SplitShards)
    assert opened.val.images.shape == (4, 3, SIZE, SIZE)
