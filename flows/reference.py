"""What samples are compared with under a protocol: features of real images, taken once for each dataset and kept.

An artifact `features`: one file of Inception features for each shard of images, made by Ray workers, resumed by shards,
and found again by every evaluation of the same images under a protocol that takes features alike.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load, save
from torch import Tensor

from flows.recipe import ScoresConfig
from flows.stage import Work
from infra.artifacts import Manifest, Plan, find, folder_of, key_of, publish
from infra.lineage import resolve
from infra.pretrained import PretrainedConfig
from infra.settings import Settings
from infra.shards import FileEntry, shard_entry, write_shard
from infra.store import Store
from infra.training import default_device
from infra.workers import map_shards
from sftok.frechet import Gaussian, moments
from sftok.inception_fast import PreparedInception, prepare_inception
from sftok.inception_file import read_inception
from sftok.measures import Features, Reference
from sftok.metrics import FeatureMoments
from sftok.protocols import ScoreProtocol
from sftok.reference_file import Statistics, write_statistics
from sftok.resize import Resize
from sftok.stored_images import StoredImages

VERSION = 1  # raised by hand when the same config gives other features
BATCH = 64  # images decoded at once


@dataclass(frozen=True)
class FeatureJob:
    """What every worker needs; small and picklable."""

    store: Store
    out: Store
    inception: PretrainedConfig
    resize: Resize
    precision: str
    image_size: int


class ImageShard(NamedTuple):
    """A shard of images whose features are taken."""

    key: str
    rows: int

    @property
    def name(self) -> str:
        """The file of its features."""
        return f"{self.key.rpartition('/')[2].removesuffix('.parquet')}.safetensors"


class ShardFeatures:
    """A worker: holds the network, takes the features of one shard a call."""

    def __init__(self, job: FeatureJob) -> None:
        self.job = job
        network = read_inception(job.inception, job.store, "evaluate.scores.inception")
        self.network = prepare_inception(network, precision=job.precision, device=default_device())

    def __call__(self, shard: ImageShard) -> FileEntry:
        """Take the features of a shard; one that is done is not done again."""
        if (done := shard_entry(self.job.out, shard.name)) is not None:
            return done
        images = StoredImages(self.job.store, {shard.key: shard.rows}, self.job.image_size)
        parts = [features_of(self.network, batch, self.job.resize) for batch in images.split(BATCH)]
        tensors = _tensors(functools.reduce(Features.__add__, parts)) if parts else {}
        return write_shard(self.job.out, shard.name, save(tensors), shard.rows)


def features_of(network: PreparedInception, images: Tensor, how: Resize) -> Features:
    """Features of uint8 images (n, 3, S, S), in memory of this machine."""
    parts = []
    for batch in images.split(BATCH):
        made = network(batch, how)
        parts.append(Features(made.pool.cpu(), made.spatial.cpu(), made.logits.cpu()))
    return functools.reduce(Features.__add__, parts)


def real_images(work: Work, config: ScoresConfig, protocol: ScoreProtocol, seed: int) -> Reference:
    """The reference that the training images are: statistics of all, features of some, drawn by a seed.

    Raises:
        ValueError: the weights are not there, or are others.
    """
    made = _find_or_make(work, config, protocol)
    store = work.job.store
    pool, spatial = _statistics(store, made)
    return Reference(
        description=f"the real training images of images/{work.ref('images').digest[:12]}",
        pool=pool,
        spatial=spatial,
        features=_chosen(store, made, config.reference_features, seed),
        num_images=pool.count,
        extractor_sha256=protocol.extractor_sha256,
        resize=protocol.resize,
    )


def export_statistics(text: str, file: str, *, store: str | None) -> int:
    """Write the statistics of a `features` artifact as an .npz that clean-fid, pytorch-fid and ADM's evaluator read.

    Returns:
        How many images they are of.

    Raises:
        ValueError: there is no such artifact, it is of another kind, or the file is there or cannot be written.
    """
    place, path = Store(store or Settings().store), Path(file).expanduser()
    manifest = resolve(place, text)
    if manifest.kind != "features":
        raise ValueError(f"{text!r} is {manifest.kind}/{manifest.digest}, where features are wanted: see `sftok ls`")
    if path.exists():
        raise ValueError(f"{path} exists: name another file, or remove it")
    pool, spatial = _statistics(place, manifest)
    try:
        path.write_bytes(write_statistics(Statistics(pool, spatial)))
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror or error}): name another file") from error
    return manifest.counts["images"]


def _statistics(store: Store, made: Manifest) -> tuple[Gaussian, Gaussian]:
    """Of pool and of spatial features, one shard of them in memory at a time."""
    pool = spatial = None
    for features in _shards(store, made):
        assert features.spatial is not None
        pool = _added(pool, features.pool)
        spatial = _added(spatial, features.spatial)
    assert pool is not None, "a split without images is refused by prepare"
    assert spatial is not None
    return Gaussian.of(pool), Gaussian.of(spatial)


def _find_or_make(work: Work, config: ScoresConfig, protocol: ScoreProtocol) -> Manifest:
    plan = Plan(
        kind="features",
        version=VERSION,
        config={
            "extractor": protocol.extractor,
            "extractor_sha256": protocol.extractor_sha256,
            "resize": protocol.resize,
            "precision": config.precision,
            "image_size": work.recipe.data.image_size,
            "split": "train",
        },
        inputs={"images": work.ref("images")},
    )
    store = work.job.store
    if (made := find(store, plan)) is not None:
        return made
    assert protocol.resize != "none"
    out = folder_of(store, plan.kind, plan.digest)
    job = FeatureJob(store, out, config.inception, protocol.resize, config.precision, work.recipe.data.image_size)
    shards = [ImageShard(key, rows) for key, rows in work.rows("images", "train").items() if rows]
    files = map_shards(functools.partial(ShardFeatures, job), shards, options=work.job.workers)
    counts = {"images": sum(shard.rows for shard in shards)}
    return publish(store, plan, files=files, counts=counts, metrics={}, seconds=0)


def _shards(store: Store, made: Manifest) -> Iterator[Features]:
    """Features of one shard at a time, in the order of the shards."""
    for entry in made.files:
        tensors = load(store.read(key_of(made, entry)))
        yield Features(tensors["pool"], tensors["spatial"], tensors["logits"])


def _chosen(store: Store, made: Manifest, most: int, seed: int) -> Tensor:
    """Pool features of at most `most` images, as many of each shard as its share, the same for a seed."""
    count = made.counts["images"]
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(count, generator=generator)[:most].sort().values
    parts, before = [], 0
    for features in _shards(store, made):
        here = chosen[(chosen >= before) & (chosen < before + len(features))] - before
        parts.append(features.pool[here])
        before += len(features)
    return torch.cat(parts)


def _added(total: FeatureMoments | None, rows: Tensor) -> FeatureMoments:
    found = moments(rows)
    return found if total is None else total + found


def _tensors(features: Features) -> dict[str, Tensor]:
    parts = {"pool": features.pool, "spatial": features.spatial, "logits": features.logits}
    return {name: part.contiguous() for name, part in parts.items() if part is not None}
