"""One image shard to one code shard: the same bytes wherever and with whom it is made.

Shapes: B images, N latent tokens.
"""

import json
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from infra.codes import CodeRows, CodesInfo, to_parquet
from infra.device import IEEE, NumericsConfig, default_device, device_facts, use_numerics
from infra.errors import TransientError
from infra.made_on import begin_shards
from infra.memory import full_memory
from infra.reuse import Reuse
from infra.shards import FileEntry, shard_entry, split_of, write_shard
from infra.store import Store
from sftok.artifacts import load_tokenizer
from sftok.config import Assignment, AugmentConfig
from sftok.data import FailedImage, ImageRows, decoded_chunks, variant_images
from sftok.inference import PreparedEncoder, prepare_encoder
from sftok.model import SFTok
from sftok.views import TEN_CROP_RESIZE, has_crops, ten_crop_side

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

    def variants_of(self, name: str) -> tuple[str, ...]:
        """The views of the images of a shard."""
        return self.variants[split_of(name) or name]


class CodeShard(NamedTuple):
    """A finished code shard, and the images that have no rows in it."""

    file: FileEntry
    failed: list[FailedImage]


class ShardEncoder:
    """A worker: holds the model, encodes one shard a call.

    A chunk of images is encoded while the next ones are read and decoded in threads. Shards do not overlap within a
    worker: where their reading and writing leave a GPU idle, two workers share it (`gpus_per_worker` = 0.5).
    """

    def __init__(self, job: EncodeJob) -> None:
        self.job = job
        device = job.device or default_device()
        use_numerics(job.numerics, device)
        begin_shards(job.out, device_facts(device, job.numerics))
        with full_memory(_REMEDY, TransientError):
            model = load_tokenizer(job.tokenizer).to(device)
            self.encoder = prepare_encoder(model, job.info.precision)

    def __call__(self, images: FileEntry) -> CodeShard:
        """Encode an image shard into the code shard of the same name; one that is done is not done again.

        Raises:
            ValueError: the image shard is damaged, or has other rows than its entry says.
            TransientError: memory ran out.
        """
        if (done := finished_shard(self.job, images)) is not None:
            return done
        with full_memory(_REMEDY, TransientError):
            rows, failed = self._encode(images)
            notes = {_FAILED_KEY: json.dumps(failed, separators=(",", ":"), ensure_ascii=False)} if failed else None
            data = to_parquet(self.job.info, rows, notes)
        file = write_shard(self.job.out, images.path, data, len(rows.image_id))
        if self.job.reuse is not None and not failed:  # an image that failed once may be mended by the next time
            self.job.reuse.offer(images, file)
        return CodeShard(file, failed)

    def _encode(self, images: FileEntry) -> tuple[CodeRows, list[FailedImage]]:
        """All views of all images of a shard, never more than a few micro-batches of them in memory."""
        job, variants, info = self.job, self.job.variants_of(images.path), self.job.info
        parts: list[CodeRows] = []
        failed: list[FailedImage] = []
        found = 0
        larger_size = ten_crop_side(info.image_size, job.ten_crop_resize) if has_crops(variants) else None
        for chunk in decoded_chunks(job.images, images.path, info.image_size, job.micro_batch, larger_size=larger_size):
            found += len(chunk.rows.image_ids) + len(chunk.failed)
            failed += chunk.failed
            parts += [self._view(chunk.rows, variant) for variant in variants if chunk.rows.image_ids]
        rows = CodeRows(
            image_id=[image_id for part in parts for image_id in part.image_id],
            class_id=np.concatenate([part.class_id for part in parts] or [np.empty(0, np.int32)]),
            variant=[variant for part in parts for variant in part.variant],
            codes=np.concatenate([part.codes for part in parts] or [np.empty((0, info.num_tokens), info.dtype)]),
        )
        if found != images.rows:
            raise ValueError(
                f"{job.images.uri}/{images.path} has {found} images, its manifest says {images.rows}:"
                " delete the folder and prepare the data again"
            )
        return rows, failed

    def _view(self, rows: ImageRows, variant: str) -> CodeRows:
        images = variant_images(rows, variant, self.job.augment)
        codes = encode_batches(self.encoder, images, self.job.info.assignment, self.job.micro_batch)
        return CodeRows(
            image_id=rows.image_ids,
            class_id=rows.class_ids.numpy().astype(np.int32),
            variant=[variant] * len(rows.image_ids),
            codes=codes.numpy().astype(self.job.info.dtype),
        )


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
    codes = []
    for part in images.split(micro_batch):
        if len(part) < micro_batch:
            part = torch.cat([part, part.new_zeros(micro_batch - len(part), *part.shape[1:])])
        codes.append(encoder(part, assignment).cpu())
    return torch.cat(codes)[: len(images)] if len(images) else torch.empty(0, encoder.num_tokens, dtype=torch.int64)


def _read_failed(folder: Store, name: str) -> list[FailedImage]:
    with folder.open(name) as file, pq.ParquetFile(file) as parquet:
        told = (parquet.schema_arrow.metadata or {}).get(_FAILED_KEY.encode(), b"[]")
    return [FailedImage(*image) for image in json.loads(told)]
