"""What overlaps while shards are encoded: decoding in processes, copies to a device, fetching codes, writing."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from infra.artifacts.manifest import Manifest
from infra.artifacts.shards import FileEntry, write_shard
from infra.errors import TransientError
from infra.store.store import Store
from sftok.coding.encode import EncodeJob, encode
from sftok.coding.shard import ShardEncoder
from sftok.coding.transfer import DeviceTransfer
from sftok.config import AugmentConfig
from sftok.images.dataset import ImageRows, variant_images
from sftok.images.preprocess import augment, to_float, uniforms
from tests.sftok.coding.test_encode import HERE, copied, hashes, home, job_of, reference  # noqa: F401

MOVING = AugmentConfig(crop="center", flip=True, rotate=15, shift=0.1, zoom=0.1)


def shards_of(images: Manifest) -> list[FileEntry]:
    return [entry for entry in images.files if entry.path != "rejects.parquet"]


def changed(job: EncodeJob, **changes: object) -> EncodeJob:
    return EncodeJob(**{**vars(job), **changes})


def test_a_process_that_decodes_and_dies_is_trouble_that_passes(copied, reference) -> None:  # noqa: F811
    store, images = copied()
    job = changed(job_of(store, images), decoders=1)
    worker, first = ShardEncoder(job), shards_of(images)[0]
    worker(first)
    (process,) = worker.decoders._started
    process._process.kill()
    with pytest.raises(TransientError, match="a process that decodes images was ended by signal 9"):
        worker(shards_of(images)[1])
    assert hashes(encode(job, images, options=HERE).files) == reference


def test_shards_of_a_run_overlap_and_are_the_same(copied, reference, monkeypatch) -> None:  # noqa: F811
    """A shard is written only when the next one is being encoded: nobody waits for a store."""
    store, images = copied()
    worker, shards = ShardEncoder(job_of(store, images)), shards_of(images)
    encoding = [threading.Event() for _ in shards]
    begun: list[str] = []
    encoder, views = worker.encoder, worker._views

    def begin(shard: object, chunk: object) -> object:
        name = shard.images.path  # type: ignore[attr-defined]
        if name not in begun:
            begun.append(name)
            encoding[len(begun) - 1].set()
        return views(shard, chunk)  # type: ignore[arg-type]

    def write(folder: Store, name: str, data: bytes, rows: int) -> FileEntry:
        following = begun.index(name) + 1
        assert following == len(shards) or encoding[following].wait(20)
        return write_shard(folder, name, data, rows)

    monkeypatch.setattr(worker, "_views", begin)
    monkeypatch.setattr("sftok.coding.shard.write_shard", write)
    assert encoder is worker.encoder
    assert hashes([shard.file for shard in worker.several(shards)]) == reference
    assert begun == [entry.path for entry in shards]


def test_what_is_wrong_with_a_shard_of_a_run_leaves_those_before(copied, monkeypatch) -> None:  # noqa: F811
    store, images = copied()
    job, shards = job_of(store, images), shards_of(images)
    wrong = shards[2].model_copy(update={"rows": 1 + (shards[2].rows or 0)})
    with pytest.raises(ValueError, match=f"{wrong.path} has {wrong.rows - 1} images, its manifest says {wrong.rows}"):
        ShardEncoder(job).several([*shards[:2], wrong, *shards[3:]])
    assert {f"{entry.path}.json" for entry in shards[:2]} <= set(job.out.list())


def test_runs_are_told_of_in_shards(copied, reference, monkeypatch) -> None:  # noqa: F811
    store, images = copied()
    monkeypatch.setattr("sftok.coding.encode._run", lambda count, job, options: 3)
    told: list[tuple[int, int]] = []
    made = encode(
        job_of(store, images), images, options=HERE, progress=lambda done, total, figures: told.append((done, total))
    )
    assert hashes(made.files) == reference
    assert told == [(3, 8), (6, 8), (8, 8)]


def test_codes_are_taken_a_batch_late(copied) -> None:  # noqa: F811
    store, images = copied()
    worker, order = (
        ShardEncoder(changed(job_of(store, images), variants=dict.fromkeys(("train", "val"), ("center",)))),
        [],
    )
    encoder, fetch = worker.encoder, worker.transfer.fetch

    def encoded(pixels: Tensor, assignment: str) -> Tensor:
        order.append("encode")
        return encoder(pixels, assignment)  # type: ignore[arg-type]

    def fetched(codes: Tensor) -> Callable[[], Tensor]:
        wait = fetch(codes)

        def take() -> Tensor:
            order.append("take")
            return wait()

        return take

    worker.encoder, worker.transfer.fetch = encoded, fetched  # type: ignore[assignment,method-assign]
    worker(shards_of(images)[0])
    assert order[:4] == ["encode", "encode", "take", "encode"]
    assert order.count("encode") == order.count("take") > 2


def test_a_lane_without_a_gpu_copies_nothing() -> None:
    transfer, tensor = DeviceTransfer(torch.device("cpu")), torch.arange(6)
    assert transfer.send(tensor) is tensor
    assert transfer.fetch(tensor)() is tensor


def test_floats_are_quotients_of_255_bit_for_bit() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_float(levels), (torch.arange(256, dtype=torch.float64) / 255).float())


# --- on a GPU --------------------------------------------------------------------------------------------------------


def rows_of(count: int, size: int) -> ImageRows:
    pixels = torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(0))
    larger = torch.randint(0, 256, (count, 3, size + 4, size + 4), generator=torch.Generator().manual_seed(1))
    ids = [f"{number:03d}" for number in range(count)]
    return ImageRows(ids, pixels.byte(), torch.zeros(count, dtype=torch.int64), larger=larger.byte())


@pytest.mark.gpu
def test_views_made_on_a_gpu_are_those_of_the_cpu() -> None:
    rows = rows_of(5, 32)
    assert rows.larger is not None
    on_gpu = rows._replace(images=rows.images.cuda(), larger=rows.larger.cuda())
    for variant in ("center", "flip", "crop-2", "crop-7"):
        assert torch.equal(variant_images(on_gpu, variant, MOVING).cpu(), variant_images(rows, variant, MOVING))
    found, wanted = variant_images(on_gpu, "affine-1", MOVING), variant_images(rows, "affine-1", MOVING)
    assert found.is_cuda
    assert torch.allclose(found.cpu(), wanted, atol=1e-4)
    draws = [uniforms("test", number) for number in range(5)]
    changed = augment(to_float(on_gpu.images), MOVING, draws)
    assert torch.allclose(changed.cpu(), augment(to_float(rows.images), MOVING, draws), atol=1e-4)


@pytest.mark.gpu
def test_what_is_sent_and_fetched_beside_a_gpus_work_arrives() -> None:
    """Buffers are let go of at once, and the device is kept busy: a copy too late or too early would show."""
    transfer, late = DeviceTransfer(torch.device("cuda")), []
    weights = torch.randn(2048, 2048, device="cuda")
    for number in range(40):
        pixels = torch.full((64, 3, 64, 64), number, dtype=torch.uint8, pin_memory=True)
        sent = transfer.send(pixels)
        del pixels
        for _ in range(4):
            weights = (weights @ weights).tanh()
        late.append(transfer.fetch(sent.to(torch.int64).sum(1)))
        del sent
    for number, wait in enumerate(late):
        assert (wait() == 3 * number).all()


@pytest.mark.gpu
def test_shards_encoded_on_a_gpu_are_whole_and_repeatable(copied, tmp_path: Path) -> None:  # noqa: F811
    store, images = copied()
    job = job_of(store, images)
    began = time.monotonic()
    first = encode(changed(job, out=Store(tmp_path / "one"), reuse=None), images, options=HERE)
    again = encode(changed(job, out=Store(tmp_path / "two"), reuse=None, decoders=2), images, options=HERE)
    assert hashes(first.files) == hashes(again.files)
    assert first.counts["failed"] == 0
    assert time.monotonic() - began < 120
