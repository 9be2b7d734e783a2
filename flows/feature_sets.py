"""Inception features of many images: one file for each shard, taken by Ray workers, resumed by shards, and kept.

Of real images they are what others are compared with; of samples and reconstructions, what is compared. Whoever scores
alike finds them again: an artifact `features` is named by images, the extractor's hash, the resize and the precision.
"""

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from pydantic import JsonValue
from safetensors.torch import load, save
from torch import Tensor

from flows.recipe import ScoresConfig
from flows.stage import Work
from infra.artifacts import ArtifactRef, Manifest, Plan, find, folder_of, key_of, publish
from infra.codes import read_codes
from infra.pretrained import PretrainedConfig
from infra.shards import FileEntry, shard_entry, write_shard
from infra.store import Store
from infra.training import default_device
from infra.workers import map_shards
from sftok.artifacts import load_teacher, load_tokenizer
from sftok.config import DecodingConfig
from sftok.decode import ImageDecoder
from sftok.inception_fast import PreparedInception, prepare_inception
from sftok.inception_file import read_inception
from sftok.measures import Features
from sftok.protocols import ScoreProtocol
from sftok.resize import Resize
from sftok.stored_images import StoredImages

VERSION = 1  # raised by hand when the same config gives other features
BATCH = 64  # images in memory at once
SHOWN = "center"  # the view that is reconstructed


class Shard(NamedTuple):
    """A shard of images, or of codes of samples."""

    key: str
    rows: int

    @property
    def name(self) -> str:
        """The file of its features."""
        return f"{self.key.rpartition('/')[2].removesuffix('.parquet')}.safetensors"


@dataclass(frozen=True)
class Decoding:
    """How codes become the images that are looked at."""

    tokenizer: Store
    teacher: Store
    config: DecodingConfig
    micro_batch: int
    seed: int
    variant: str | None = None
    """the view whose codes are looked at; None: all."""


@dataclass(frozen=True)
class FeatureJob:
    """What every worker needs; small and picklable."""

    store: Store
    out: Store
    inception: PretrainedConfig
    resize: Resize
    precision: str
    image_size: int
    decoding: Decoding | None = None
    """of shards of codes; None: the shards are images."""


class ShardFeatures:
    """A worker: holds the networks, takes the features of one shard a call, some images in memory at a time."""

    def __init__(self, job: FeatureJob) -> None:
        self.job, device = job, default_device()
        network = read_inception(job.inception, job.store, "evaluate.scores.inception")
        self.network = prepare_inception(network, precision=job.precision, device=device)
        self.decoder: ImageDecoder | None = None
        if (decoding := job.decoding) is not None:
            model, teacher = load_tokenizer(decoding.tokenizer).to(device), load_teacher(decoding.teacher).to(device)
            self.decoder = ImageDecoder(model, teacher, micro_batch=decoding.micro_batch, seed=decoding.seed)

    def __call__(self, shard: Shard) -> FileEntry:
        """Take the features of a shard; one that is done is not done again."""
        if (done := shard_entry(self.job.out, shard.name)) is not None:
            return done
        made = joined(features_of(self.network, images, self.job.resize) for images in self._images(shard))
        return write_shard(self.job.out, shard.name, save(_tensors(made)), len(made))

    def _images(self, shard: Shard) -> Iterator[Tensor]:
        if self.decoder is None or self.job.decoding is None:
            yield from StoredImages(self.job.store, {shard.key: shard.rows}, self.job.image_size).split(BATCH)
            return
        _, rows = read_codes(self.job.store, [shard.key])
        wanted = self.job.decoding.variant
        chosen = [at for at, variant in enumerate(rows.variant) if wanted in (None, variant)]
        codes, ids = torch.from_numpy(rows.codes.astype("int64"))[chosen], [rows.image_id[at] for at in chosen]
        size = -(-BATCH // self.job.decoding.micro_batch) * self.job.decoding.micro_batch
        for at in range(0, len(codes), size):
            yield self.decoder(codes[at : at + size], ids[at : at + size], self.job.decoding.config).images


def features_of(network: PreparedInception, images: Tensor, how: Resize) -> Features:
    """Features of uint8 images (n, 3, S, S), in memory of this machine."""
    made = [network(batch, how) for batch in images.split(BATCH)]
    return joined(Features(one.pool.cpu(), one.spatial.cpu(), one.logits.cpu()) for one in made)


def joined(parts: Iterable[Features]) -> Features:
    """Features one after the other; each is copied once.

    Raises:
        ValueError: there are none.
    """
    pool, spatial, logits = zip(*((part.pool, part.spatial, part.logits) for part in parts), strict=True)
    return Features(torch.cat(pool), torch.cat(spatial), torch.cat(logits))


def of_real_images(work: Work, config: ScoresConfig, protocol: ScoreProtocol, split: str = "train") -> Manifest:
    """Features of the training images, or of those that are held out, found or taken.

    Raises:
        ValueError: the network's weights are not there, or are others.
    """
    inputs = {"images": work.ref("images")}
    return _find_or_take(work, config, protocol, {"split": split}, inputs, work.rows("images", split), None)


def of_samples(work: Work, config: ScoresConfig, protocol: ScoreProtocol) -> Manifest:
    """Features of the decoded samples, found or taken.

    Raises:
        ValueError: the network's weights are not there, or are others.
    """
    decoding = _decoding(work, work.recipe.decoding)
    return _of_codes(work, config, protocol, {}, ("samples", work.rows("samples", "sample")), decoding)


def of_reconstructions(work: Work, config: ScoresConfig, protocol: ScoreProtocol, num_steps: int) -> Manifest:
    """Features of the held-out images' reconstructions in so many decoding steps, found or taken.

    Raises:
        ValueError: the network's weights are not there, or are others.
    """
    decoding = _decoding(work, work.recipe.decoding.model_copy(update={"num_steps": num_steps}), SHOWN)
    return _of_codes(work, config, protocol, {"variant": SHOWN}, ("codes", work.rows("codes", "val")), decoding)


def _decoding(work: Work, config: DecodingConfig, variant: str | None = None) -> Decoding:
    recipe = work.recipe
    tokenizer, teacher = work.folder("tokenizer"), work.folder("teacher")
    return Decoding(tokenizer, teacher, config, recipe.encode.micro_batch, recipe.seed, variant)


def _of_codes(
    work: Work,
    config: ScoresConfig,
    protocol: ScoreProtocol,
    which: dict[str, JsonValue],
    codes: tuple[str, dict[str, int]],
    decoding: Decoding,
) -> Manifest:
    name, rows = codes
    what: dict[str, JsonValue] = {
        **which,
        "decoding": decoding.config.as_json(),
        "micro_batch": decoding.micro_batch,
        "seed": decoding.seed,
        "threads": work.job.workers.threads_per_worker,
    }
    inputs = {each: work.ref(each) for each in (name, "tokenizer", "teacher")}
    return _find_or_take(work, config, protocol, what, inputs, rows, decoding)


def feature_shards(store: Store, made: Manifest) -> Iterator[Features]:
    """Features of one shard at a time, in the order of the shards."""
    for entry in made.files:
        tensors = load(store.read(key_of(made, entry)))
        yield Features(tensors["pool"], tensors["spatial"], tensors["logits"])


def _find_or_take(
    work: Work,
    config: ScoresConfig,
    protocol: ScoreProtocol,
    what: dict[str, JsonValue],
    inputs: dict[str, ArtifactRef],
    rows: dict[str, int],
    decoding: Decoding | None,
) -> Manifest:
    taken: dict[str, JsonValue] = {
        "extractor": protocol.extractor,
        "extractor_sha256": protocol.extractor_sha256,
        "resize": protocol.resize,
        "precision": config.precision,
        "image_size": work.recipe.data.image_size,
    }
    plan, store = Plan(kind="features", version=VERSION, config={**taken, **what}, inputs=inputs), work.job.store
    if (made := find(store, plan)) is not None:
        return made
    assert protocol.resize != "none"
    out, size = folder_of(store, plan.kind, plan.digest), work.recipe.data.image_size
    job = FeatureJob(store, out, config.inception, protocol.resize, config.precision, size, decoding)
    shards = [Shard(key, count) for key, count in rows.items() if count]
    files = map_shards(functools.partial(ShardFeatures, job), shards, options=work.job.workers)
    counts = {"images": sum(file.rows or 0 for file in files)}
    return publish(store, plan, files=files, counts=counts, metrics={}, seconds=0)


def _tensors(features: Features) -> dict[str, Tensor]:
    parts = {"pool": features.pool, "spatial": features.spatial, "logits": features.logits}
    return {name: part.contiguous() for name, part in parts.items() if part is not None}
