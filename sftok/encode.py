"""Images to codes: one image shard in, one code shard out, the same bytes wherever and with whom it runs.

Shapes: B images, N latent tokens.
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from infra.artifacts import FileEntry, shard_entry, write_shard
from infra.codes import CodeRows, CodesInfo, to_parquet
from infra.progress import Progress, silent
from infra.store import Store
from infra.training import default_device
from infra.workers import WorkerOptions, map_shards
from sftok.artifacts import load_tokenizer
from sftok.config import Assignment, AugmentConfig
from sftok.data import ImageSet, variant_images
from sftok.model import SFTok


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


class ShardEncoder:
    """A worker: holds the model, encodes one shard a call."""

    def __init__(self, job: EncodeJob) -> None:
        self.job = job
        self.model = load_tokenizer(job.tokenizer).to(default_device())
        self.set = ImageSet.open(job.images)

    def __call__(self, name: str) -> FileEntry:
        """Encode an image shard into the code shard of the same name; one that is done is not done again."""
        done = shard_entry(self.job.out, name)
        if done is not None:
            return done
        rows = self.set.read_shard(name, self.job.info.image_size)
        codes, variants = [], self.job.variants[name.split("-")[0]]
        for variant in variants:
            images = variant_images(rows, variant, self.job.augment)
            codes.append(encode_images(self.model, images, self.job.info.assignment, self.job.micro_batch).numpy())
        table = CodeRows(
            image_id=rows.image_ids * len(variants),
            class_id=np.tile(rows.class_ids.numpy().astype(np.int32), len(variants)),
            variant=[variant for variant in variants for _ in rows.image_ids],
            codes=np.concatenate(codes).astype(self.job.info.dtype),
        )
        return write_shard(self.job.out, name, to_parquet(self.job.info, table), len(table.image_id))


def encode(job: EncodeJob, *, options: WorkerOptions, progress: Progress = silent) -> list[FileEntry]:
    """Encode every shard of the image set; entries in the order of the shards."""
    names = ImageSet.open(job.images).names
    return map_shards(functools.partial(ShardEncoder, job), names, options=options, progress=progress)


@torch.no_grad()
def encode_images(model: SFTok, images: Tensor, assignment: Assignment, micro_batch: int) -> Tensor:
    """Codes (n, N) int64 of float images (n, 3, H, W), in micro-batches of one fixed size, the last one padded.

    Near-ties are decided by rounding, and products of other shapes round otherwise: the fixed size keeps codes equal.
    """
    codes, device = [], next(model.parameters()).device
    for part in images.split(micro_batch):
        padded = torch.cat([part, part.new_zeros(micro_batch - len(part), *part.shape[1:])])
        codes.append(model.encode(padded.to(device), assignment).codes[: len(part)].cpu())
    return torch.cat(codes) if codes else torch.empty(0, model.config.num_latent_tokens, dtype=torch.int64)
