"""One image shard to one code shard: on one kind of device the same bytes, wherever and with whom it is made.

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
from sftok.coding.transfer import Lane
from sftok.config import Assignment, AugmentConfig
from sftok.images.chunks import Chunk, FailedImage, decoded_shards
from sftok.images.dataset import ImageRows, variant_images
from sftok.images.decode_ahead import Decoders, SquareDecoder
from sftok.images.decode_on_device import DeviceDecoders
from sftok.images.views import TEN_CROP_RESIZE, has_crops, ten_crop_side
from sftok.model.prepared import PreparedEncoder, prepare_encoder
from sftok.model.tokenizer import SFTok
from sftok.weights.artifacts import load_tokenizer

LATE = 1  # batches whose codes are fetched after the next ones were asked for
WRITERS = 4  # shards that are being written at once: on S3 it takes as long as a GPU takes to encode one
_FAILED_KEY = "sftok.failed"
# A full memory says nothing about the images: it is the worker's trouble, and trying again may help.
_REMEDY = "use fewer workers or a smaller encode.micro_batch"


@dataclass(frozen=True)
class EncodeJob:
    """What every worker of one encoding needs; small and picklable."""

    images: Store
    tokenizer: Store
    out: Store
    info: CodesInfo
    variants: dict[str, tuple[str, ...]]
    """views by split."""
    augment: AugmentConfig
    """strength of the affine views."""
    micro_batch: int
    reuse: Reuse | None = None
    """the shards of other versions of the dataset; None: each is encoded."""
    ten_crop_resize: float = TEN_CROP_RESIZE
    """side of the square that ten crops are cut from, over the image size."""
    device: str | None = None
    """where to compute; None: on a GPU where a worker has one."""
    numerics: NumericsConfig = IEEE
    compile: bool = False
    """whether the encoder's blocks are compiled: for CUDA; rounds otherwise."""
    decoder: Literal["pil", "torchcodec"] = "pil"
    """what decodes and resizes images: Pillow, or torchcodec and torch where the encoder computes."""
    decoders: int | None = None
    """processes of a worker that decode by Pillow; 0: threads, None: what suits its cores. Changes no byte."""

    def variants_of(self, name: str) -> tuple[str, ...]:
        """The views of the images of a shard."""
        return self.variants[split_of(name) or name]


class CodeShard(NamedTuple):
    """A finished code shard, and the images that have no rows in it."""

    file: FileEntry
    failed: list[FailedImage]


class _Making:
    """A code shard in the making."""

    def __init__(self, images: FileEntry) -> None:
        self.images = images
        self.parts: list[CodeRows] = []
        self.failed: list[FailedImage] = []
        self.found = 0
        self.written: Future[CodeShard] | None = None


class _Late(NamedTuple):
    """Codes that a device may still be computing."""

    shard: _Making
    rows: ImageRows
    variant: str
    codes: Callable[[], Tensor]


class ShardEncoder:
    """A worker: holds the model, encodes one shard a call, or several.

    A chunk of images is encoded while the next ones are read and decoded, in threads or processes, and while a GPU
    works on it the next one is sent there: codes are fetched a batch late. Several shards overlap: one is read and
    encoded while the one before is written.
    """

    def __init__(self, job: EncodeJob) -> None:
        self.job = job
        device = job.device or default_device()
        use_numerics(job.numerics, device)
        begin_shards(job.out, device_facts(device, job.numerics))
        with reraise_out_of_memory(_REMEDY, TransientError):
            model = load_tokenizer(job.tokenizer).to(device)
            self.encoder = prepare_encoder(model, job.info.precision, compile=job.compile)
        self.lane = Lane(self.encoder.device)
        self.decoders: SquareDecoder = (
            DeviceDecoders(self.encoder.device)
            if job.decoder == "torchcodec"
            else Decoders(job.decoders or 0, is_pinned=self.lane.is_cuda)
        )

    def __call__(self, images: FileEntry) -> CodeShard:
        """Encode an image shard into the code shard of the same name; one that is done is not done again.

        Raises:
            ValueError: the image shard is damaged, or has other rows than its entry says.
            TransientError: memory ran out, or a process that decodes ended.
        """
        return self.several([images])[0]

    def several(self, shards: Sequence[FileEntry]) -> list[CodeShard]:
        """The same for several image shards, one after the other, in their order."""
        found = {images.path: finished_shard(self.job, images) for images in shards}
        missing = [images for images in shards if found[images.path] is None]
        with reraise_out_of_memory(_REMEDY, TransientError):
            made = iter(self._encode(missing))
        return [found[images.path] or next(made) for images in shards]

    def _encode(self, shards: Sequence[FileEntry]) -> list[CodeShard]:
        """All views of all images of shards, never more than a few micro-batches of them in memory."""
        makings = [_Making(images) for images in shards]
        sides = [(images.path, self._sides(self.job.variants_of(images.path))) for images in shards]
        chunks = decoded_shards(self.job.images, sides, self.job.micro_batch, self.decoders)
        late: deque[_Late | _Making] = deque()
        with ThreadPoolExecutor(WRITERS, thread_name_prefix="write") as writer:
            for index, chunk in chunks:
                for one in [makings[index]] if chunk is None else self._views(makings[index], chunk):
                    late.append(one)
                    while len(late) > LATE:
                        self._settle(late.popleft(), makings, writer)
            while late:
                self._settle(late.popleft(), makings, writer)
            return [making.written.result() for making in makings if making.written is not None]

    def _sides(self, variants: Sequence[str]) -> tuple[int, ...]:
        """Sides of the squares that these views are made of."""
        size = self.job.info.image_size
        return (size, ten_crop_side(size, self.job.ten_crop_resize)) if has_crops(variants) else (size,)

    def _views(self, shard: _Making, chunk: Chunk) -> Iterator[_Late]:
        """Begin to encode all views of a chunk."""
        shard.found += len(chunk.rows.image_ids) + len(chunk.failed)
        shard.failed += chunk.failed
        if not chunk.rows.image_ids:
            return
        larger = chunk.rows.larger
        rows = chunk.rows._replace(
            images=self.lane.send(chunk.rows.images), larger=None if larger is None else self.lane.send(larger)
        )
        for variant in self.job.variants_of(shard.images.path):
            images = _filled(variant_images(rows, variant, self.job.augment), self.job.micro_batch)
            codes = self.encoder(images, self.job.info.assignment)[: len(rows.image_ids)]
            yield _Late(shard, chunk.rows, variant, self.lane.fetch(codes))

    def _settle(self, late: _Late | _Making, makings: Sequence[_Making], writer: ThreadPoolExecutor) -> None:
        """Take codes when they are there; a shard that has all of its own is written while others are encoded."""
        if isinstance(late, _Making):
            writes = [making.written for making in makings if making.written is not None]
            unfinished = [write for write in writes if not write.done()]
            for write in (*(write for write in writes if write.done()), *unfinished[: 1 - WRITERS]):
                write.result()  # what went wrong ends the work here, and few shards wait to be written
            late.written = writer.submit(self._write, late)
            return
        codes = CodeRows(
            image_id=late.rows.image_ids,
            class_id=late.rows.class_ids.numpy().astype(np.int32),
            variant=[late.variant] * len(late.rows.image_ids),
            codes=late.codes().numpy().astype(self.job.info.dtype),
        )
        late.shard.parts.append(codes)

    def _write(self, shard: _Making) -> CodeShard:
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
        if job.reuse is not None and not failed:  # an image that failed once may be mended by the next time
            job.reuse.offer(shard.images, file)
        return CodeShard(file, failed)


class RunEncoder:
    """A worker: encodes a run of shards a call, which overlap; for GPUs, which are done with a shard in no time."""

    def __init__(self, job: EncodeJob) -> None:
        self.encode = ShardEncoder(job)

    def __call__(self, shards: Sequence[FileEntry]) -> list[CodeShard]:
        """Encode the shards as `ShardEncoder` does."""
        return self.encode.several(shards)


def find_shard(job: EncodeJob, images: FileEntry) -> CodeShard | None:
    """A shard that need not be encoded: this artifact's own, or another version's."""
    if (own := finished_shard(job, images)) is not None:
        return own
    theirs = job.reuse.find(images) if job.reuse is not None else None
    return None if theirs is None else CodeShard(theirs, [])


def finished_shard(job: EncodeJob, images: FileEntry) -> CodeShard | None:
    """The code shard of an image shard if this artifact has it already."""
    file = shard_entry(job.out, images.path)
    if file is None:
        return None
    is_whole = file.rows == (images.rows or 0) * len(job.variants_of(images.path))
    return CodeShard(file, [] if is_whole else _read_failed(job.out, images.path))


def encode_images(model: SFTok, images: Tensor, assignment: Assignment, micro_batch: int) -> Tensor:
    """Codes (n, N) int64 of float images (n, 3, H, W) in float32; who encodes more than once prepares the model."""
    return encode_batches(prepare_encoder(model), images, assignment, micro_batch)


def encode_batches(encoder: PreparedEncoder, images: Tensor, assignment: Assignment, micro_batch: int) -> Tensor:
    """Codes (n, N) int64 of float images (n, 3, H, W), in micro-batches of one fixed size, the last one padded.

    Near-ties are decided by rounding, and products of other shapes round otherwise: the fixed size keeps codes equal.
    """
    codes = [encoder(_filled(part, micro_batch), assignment).cpu() for part in images.split(micro_batch)]
    return torch.cat(codes)[: len(images)] if len(images) else torch.empty(0, encoder.num_tokens, dtype=torch.int64)


def _filled(images: Tensor, count: int) -> Tensor:
    """Images, with black ones behind them until there are `count`."""
    missing = count - len(images)
    return torch.cat([images, images.new_zeros(missing, *images.shape[1:])]) if missing else images


def _read_failed(folder: Store, name: str) -> list[FailedImage]:
    with folder.open(name) as file, pq.ParquetFile(file) as parquet:
        told = (parquet.schema_arrow.metadata or {}).get(_FAILED_KEY.encode(), b"[]")
    return [FailedImage(*image) for image in json.loads(told)]
