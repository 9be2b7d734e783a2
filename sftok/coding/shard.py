"""Encode one image shard to one code shard: the same bytes on one kind of device, whatever else is encoded with it.

Shapes: B images, N latent tokens.
"""

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from infra.artifacts.made_on import begin_shards
from infra.artifacts.reuse import Reuse
from infra.artifacts.shards import FileEntry, shard_entry, split_of, write_shard
from infra.codes.contract import CodeRows, CodesInfo, to_parquet
from infra.compute.device import IEEE, NumericsConfig, default_device, device_facts, use_numerics
from infra.compute.memory import reraise_out_of_memory
from infra.errors import TransientError
from infra.store.store import Store
from sftok.coding.transfer import DeviceTransfer
from sftok.config import Assignment, AugmentConfig
from sftok.images.chunks import Chunk, FailedImage, decoded_shards
from sftok.images.dataset import ImageRows, variant_images
from sftok.images.decode_ahead import Decoders, SquareDecoder
from sftok.images.decode_on_device import DeviceDecoders
from sftok.images.views import TEN_CROP_RESIZE, has_crops, ten_crop_side
from sftok.model.prepared import PreparedEncoder, prepare_encoder
from sftok.model.tokenizer import SFTok
from sftok.weights.artifacts import load_tokenizer

PENDING = 1  # batches queued on the device before the codes of an earlier one are fetched
WRITERS = 4  # shards written concurrently: on S3 a write takes as long as a GPU takes to encode a shard
_FAILED_KEY = "sftok.failed"
# Running out of memory says nothing about the images: it is a problem of the worker, and a retry may help.
_REMEDY = "use fewer workers or a smaller encode.micro_batch"


@dataclass(frozen=True)
class EncodeJob:
    """Parameters of all workers of an encoding; small and picklable."""

    images: Store
    tokenizer: Store
    out: Store
    info: CodesInfo
    variants: dict[str, tuple[str, ...]]
    """views per split."""
    augment: AugmentConfig
    """strength of the affine views."""
    micro_batch: int
    reuse: Reuse | None = None
    """cached shards of other versions of the dataset; None: every shard is encoded."""
    ten_crop_resize: float = TEN_CROP_RESIZE
    """side of the square that ten crops are cut from, divided by the image size."""
    device: str | None = None
    """device of the encoder; None: a GPU if the worker has one."""
    numerics: NumericsConfig = IEEE
    compile: bool = False
    """whether the encoder's blocks are compiled: for CUDA; rounds differently."""
    decoder: Literal["pil", "torchcodec"] = "pil"
    """decodes and resizes images: Pillow, or torchcodec and torch on the encoder's device."""
    decoders: int | None = None
    """Pillow's decoding processes per worker; 0: threads, None: by its cores. Changes no byte."""

    def variants_of(self, name: str) -> tuple[str, ...]:
        """Return the views of the images of a shard."""
        return self.variants[split_of(name) or name]


class CodeShard(NamedTuple):
    """A finished code shard, and the images that failed and have no rows in it."""

    file: FileEntry
    failed: list[FailedImage]


class _ShardBuild:
    """A code shard that is being built."""

    def __init__(self, images: FileEntry) -> None:
        self.images = images
        self.parts: list[CodeRows] = []
        self.failed: list[FailedImage] = []
        self.found = 0
        self.written: Future[CodeShard] | None = None


class _PendingCodes(NamedTuple):
    """Codes that a device may still be computing."""

    shard: _ShardBuild
    rows: ImageRows
    variant: str
    codes: Callable[[], Tensor]


class ShardEncoder:
    """A worker that holds the model and encodes one or several shards per call.

    A chunk of images is encoded while threads or processes read and decode the next ones, and while a GPU works on it
    the next one is copied there: codes are fetched one batch late. Several shards overlap: one is read and encoded
    while the previous one is written.
    """

    def __init__(self, job: EncodeJob) -> None:
        self.job = job
        device = job.device or default_device()
        use_numerics(job.numerics, device)
        begin_shards(job.out, device_facts(device, job.numerics))
        with reraise_out_of_memory(_REMEDY, TransientError):
            model = load_tokenizer(job.tokenizer).to(device)
            self.encoder = prepare_encoder(model, job.info.precision, compile=job.compile)
        self.transfer = DeviceTransfer(self.encoder.device)
        self.decoders: SquareDecoder = (
            DeviceDecoders(self.encoder.device)
            if job.decoder == "torchcodec"
            else Decoders(job.decoders or 0, is_pinned=self.transfer.is_cuda)
        )

    def __call__(self, images: FileEntry) -> CodeShard:
        """Encode an image shard to the code shard of the same name, unless it is done already.

        Raises:
            ValueError: the image shard is damaged, or has another number of rows than its entry states.
            TransientError: memory ran out, or a decoding process ended.
        """
        return self.several([images])[0]

    def several(self, shards: Sequence[FileEntry]) -> list[CodeShard]:
        """Encode several image shards, in their order, as a call does for one."""
        found = {images.path: finished_shard(self.job, images) for images in shards}
        missing = [images for images in shards if found[images.path] is None]
        with reraise_out_of_memory(_REMEDY, TransientError):
            made = iter(self._encode(missing))
        return [found[images.path] or next(made) for images in shards]

    def _encode(self, shards: Sequence[FileEntry]) -> list[CodeShard]:
        """Encode all views of all images of shards, with a few micro-batches in memory at once."""
        builds = [_ShardBuild(images) for images in shards]
        sides = [(images.path, self._sides(self.job.variants_of(images.path))) for images in shards]
        chunks = decoded_shards(self.job.images, sides, self.job.micro_batch, self.decoders)
        pending: deque[_PendingCodes | _ShardBuild] = deque()
        with ThreadPoolExecutor(WRITERS, thread_name_prefix="write") as writer:
            for index, chunk in chunks:
                for one in [builds[index]] if chunk is None else self._views(builds[index], chunk):
                    pending.append(one)
                    while len(pending) > PENDING:
                        self._settle(pending.popleft(), builds, writer)
            while pending:
                self._settle(pending.popleft(), builds, writer)
            return [build.written.result() for build in builds if build.written is not None]

    def _sides(self, variants: Sequence[str]) -> tuple[int, ...]:
        """Return the sides of the squares that views are made of."""
        size = self.job.info.image_size
        return (size, ten_crop_side(size, self.job.ten_crop_resize)) if has_crops(variants) else (size,)

    def _views(self, shard: _ShardBuild, chunk: Chunk) -> Iterator[_PendingCodes]:
        """Begin to encode all views of a chunk."""
        shard.found += len(chunk.rows.image_ids) + len(chunk.failed)
        shard.failed += chunk.failed
        if not chunk.rows.image_ids:
            return
        larger = chunk.rows.larger
        rows = chunk.rows._replace(
            images=self.transfer.send(chunk.rows.images), larger=None if larger is None else self.transfer.send(larger)
        )
        for variant in self.job.variants_of(shard.images.path):
            images = _filled(variant_images(rows, variant, self.job.augment), self.job.micro_batch)
            codes = self.encoder(images, self.job.info.assignment)[: len(rows.image_ids)]
            yield _PendingCodes(shard, chunk.rows, variant, self.transfer.fetch(codes))

    def _settle(
        self, pending: _PendingCodes | _ShardBuild, builds: Sequence[_ShardBuild], writer: ThreadPoolExecutor
    ) -> None:
        """Fetch pending codes, or write a shard whose codes are complete, while others are encoded."""
        if isinstance(pending, _ShardBuild):
            writes = [build.written for build in builds if build.written is not None]
            unfinished = [write for write in writes if not write.done()]
            for write in (*(write for write in writes if write.done()), *unfinished[: 1 - WRITERS]):
                write.result()  # raises what went wrong, and limits the shards waiting to be written
            pending.written = writer.submit(self._write, pending)
            return
        codes = CodeRows(
            image_id=pending.rows.image_ids,
            class_id=pending.rows.class_ids.numpy().astype(np.int32),
            variant=[pending.variant] * len(pending.rows.image_ids),
            codes=pending.codes().numpy().astype(self.job.info.dtype),
        )
        pending.shard.parts.append(codes)

    def _write(self, shard: _ShardBuild) -> CodeShard:
        job, info, parts, failed = self.job, self.job.info, shard.parts, shard.failed
        if shard.found != shard.images.rows:
            raise ValueError(
                f"{job.images.uri}/{shard.images.path} has {shard.found} images, its manifest says"
                f" {shard.images.rows}: delete the folder and prepare the data again"
            )
        rows = CodeRows(
            image_id=[image_id for part in parts for image_id in part.image_id],
            class_id=np.concatenate([part.class_id for part in parts] or [np.empty(0, np.int32)]),
            variant=[variant for part in parts for variant in part.variant],
            codes=np.concatenate([part.codes for part in parts] or [np.empty((0, info.num_tokens), info.dtype)]),
        )
        notes = {_FAILED_KEY: json.dumps(failed, separators=(",", ":"), ensure_ascii=False)} if failed else None
        data = to_parquet(info, rows, notes)
        shard.parts.clear()
        file = write_shard(job.out, shard.images.path, data, len(rows.image_id))
        if job.reuse is not None and not failed:  # an image that failed may be repaired by the next run
            job.reuse.offer(shard.images, file)
        return CodeShard(file, failed)


class RunEncoder:
    """A worker that encodes a run of overlapping shards per call; for GPUs, which need little time per shard."""

    def __init__(self, job: EncodeJob) -> None:
        self.encode = ShardEncoder(job)

    def __call__(self, shards: Sequence[FileEntry]) -> list[CodeShard]:
        """Encode shards; see `ShardEncoder.several`."""
        return self.encode.several(shards)


def find_shard(job: EncodeJob, images: FileEntry) -> CodeShard | None:
    """Find a code shard that need not be encoded: this artifact's own, or another version's."""
    if (own := finished_shard(job, images)) is not None:
        return own
    theirs = job.reuse.find(images) if job.reuse is not None else None
    return None if theirs is None else CodeShard(theirs, [])


def finished_shard(job: EncodeJob, images: FileEntry) -> CodeShard | None:
    """Find the code shard of an image shard in this artifact; None if it is not finished."""
    file = shard_entry(job.out, images.path)
    if file is None:
        return None
    is_whole = file.rows == (images.rows or 0) * len(job.variants_of(images.path))
    return CodeShard(file, [] if is_whole else _read_failed(job.out, images.path))


def encode_images(model: SFTok, images: Tensor, assignment: Assignment, micro_batch: int) -> Tensor:
    """Encode float images (n, 3, H, W) in float32 to codes (n, N) int64; to encode repeatedly, prepare the model."""
    return encode_batches(prepare_encoder(model), images, assignment, micro_batch)


def encode_batches(encoder: PreparedEncoder, images: Tensor, assignment: Assignment, micro_batch: int) -> Tensor:
    """Encode float images (n, 3, H, W) to codes (n, N) int64, in micro-batches of one fixed size, the last one padded.

    Near-ties are decided by rounding, which depends on the shape of a product; a fixed size keeps codes equal.
    """
    codes = [encoder(_filled(part, micro_batch), assignment).cpu() for part in images.split(micro_batch)]
    return torch.cat(codes)[: len(images)] if len(images) else torch.empty(0, encoder.num_tokens, dtype=torch.int64)


def _filled(images: Tensor, count: int) -> Tensor:
    """Pad images with black ones to `count`."""
    missing = count - len(images)
    return torch.cat([images, images.new_zeros(missing, *images.shape[1:])]) if missing else images


def _read_failed(folder: Store, name: str) -> list[FailedImage]:
    with folder.open(name) as file, pq.ParquetFile(file) as parquet:
        failed = (parquet.schema_arrow.metadata or {}).get(_FAILED_KEY.encode(), b"[]")
    return [FailedImage(*image) for image in json.loads(failed)]
