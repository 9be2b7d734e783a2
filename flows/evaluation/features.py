"""Inception features of many images, one file per shard, cached as an artifact `features` that all scores share.

Ray workers compute those of real images, the reference, and resume shard by shard. Those of samples and reconstructions
are computed while the decoded images pass through all metrics once, since decoding costs more than everything else.
The artifact is identified by the images, the extractor's hash, the resize and the precision.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from pydantic import JsonValue
from safetensors.torch import load, save
from torch import Tensor

from flows.make import find_or_publish
from flows.recipes.schema import ScoresConfig
from flows.stage import Result, Work, computed, give_up_others
from infra.artifacts.artifact import Artifact
from infra.artifacts.made_on import begin_shards
from infra.artifacts.manifest import ArtifactPlan, ArtifactRef
from infra.artifacts.pretrained import PretrainedConfig
from infra.artifacts.shards import FileEntry, shard_entry, write_shard
from infra.codes.contract import read_codes
from infra.compute.device import IEEE, device_facts, use_numerics
from infra.compute.workers import map_shards
from infra.store.store import Store
from sftok.config import DecodingConfig
from sftok.images.lazy import LazyImages
from sftok.metrics.inception.prepared import PreparedInception, prepare_inception
from sftok.metrics.inception.resize import Resize
from sftok.metrics.inception.weights import read_inception
from sftok.metrics.measure import Features
from sftok.metrics.protocols import ScoreProtocol

VERSION = 1  # raised by hand when the same config gives other features
BATCH = 64  # images in memory at once
SHOWN = "center"  # the view whose reconstructions are scored


class Shard(NamedTuple):
    """A shard of images or of codes, by its key in the store."""

    key: str
    rows: int

    @property
    def name(self) -> str:
        """The name of the file of its features."""
        return f"{self.key.rpartition('/')[2].removesuffix('.parquet')}.safetensors"


@dataclass(frozen=True)
class FeatureJob:
    """The settings that every worker is sent; small and picklable."""

    store: Store
    out: Store
    inception: PretrainedConfig
    resize: Resize
    precision: str
    image_size: int
    device: str


class ShardFeatures:
    """A worker that holds the network and computes the features of one shard per call, a batch in memory at a time."""

    def __init__(self, job: FeatureJob) -> None:
        self.job = job
        use_numerics(IEEE, job.device)
        begin_shards(job.out, device_facts(job.device, IEEE))
        network = read_inception(job.inception, job.store, "evaluate.scores.inception")
        self.network = prepare_inception(network, precision=job.precision, device=job.device)

    def __call__(self, shard: Shard) -> FileEntry:
        """Compute the features of a shard; a finished shard is not computed again."""
        if (done := shard_entry(self.job.out, shard.name)) is not None:
            return done
        images = LazyImages(self.job.store, {shard.key: shard.rows}, self.job.image_size)
        batches = images.split(max(BATCH, self.network.batches.whole))
        return _write(
            self.job.out, shard.name, joined(features_of(self.network, some, self.job.resize) for some in batches)
        )


class PassingFeatures:
    """Features of images that arrive in batches."""

    def __init__(self, network: PreparedInception, resize: Resize) -> None:
        self.network, self.resize = network, resize
        self._parts: list[Features] = []

    def add(self, images: Tensor) -> None:
        """Compute the features of the next uint8 images (n, 3, S, S), on any device."""
        self._parts.append(features_of(self.network, images, self.resize))

    def features(self) -> Features:
        """Return the features of all images so far."""
        return joined(self._parts)


class KeptFeatures(PassingFeatures):
    """Features of decoded images, published as an artifact; if they are cached, the images are ignored."""

    def __init__(
        self,
        network: PreparedInception,
        resize: Resize,
        *,
        store: Store,
        plan: ArtifactPlan,
        shards: Sequence[Shard],
        begin: Callable[[Store], None],
        places: Tensor | None = None,
    ) -> None:
        """Look for the features in the store.

        Args:
            network: computes the features.
            resize: brings images to the network's size.
            store: where the features are kept.
            plan: identifies them.
            shards: the files that are written.
            begin: called with the artifact's folder before its first file is written.
            places: index of each arriving image in the files; by default images arrive in the files' order.
        """
        super().__init__(network, resize)
        self.store, self.plan, self.shards, self.begin, self.places = store, plan, shards, begin, places
        self._kept = Artifact.find(store, plan)

    def add(self, images: Tensor) -> None:
        """Compute the features of the next uint8 images (n, 3, S, S), on any device, unless they are cached."""
        if self._kept is None:
            super().add(images)

    def features(self) -> Features:
        """Return the features of all images, in the order of the files.

        Raises:
            ValueError: fewer images arrived than the files have rows.
        """
        if self._kept is None:
            write = functools.partial(self._write, super().features())
            self._kept, _ = find_or_publish(self.store, self.plan, write)
        return joined(feature_shards(self._kept))

    def _write(self, found: Features, out: Store) -> Result:
        if len(found) != sum(shard.rows for shard in self.shards):
            raise ValueError(f"{len(found)} images passed, of {sum(shard.rows for shard in self.shards)}")
        if self.places is not None:
            found = found.rows(torch.argsort(self.places))
        self.begin(out)
        files, at = [], 0
        for shard in self.shards:
            some = found.rows(torch.arange(at, at + shard.rows))
            files.append(shard_entry(out, shard.name) or _write(out, shard.name, some))
            at += shard.rows
        return Result(files, {"images": len(found)}, {})


def features_of(network: PreparedInception, images: Tensor, how: Resize) -> Features:
    """Compute the features of uint8 images (n, 3, S, S); they are returned on the CPU."""
    made = [network(batch, how) for batch in images.split(max(BATCH, network.batches.whole))]
    return joined(Features(one.pool.cpu(), one.spatial.cpu(), one.logits.cpu()) for one in made)


def joined(parts: Iterable[Features]) -> Features:
    """Concatenate features; each is copied once.

    Raises:
        ValueError: there are none.
    """
    pool, spatial, logits = zip(*((part.pool, part.spatial, part.logits) for part in parts), strict=True)
    return Features(torch.cat(pool), torch.cat(spatial), torch.cat(logits))


def of_real_images(work: Work, config: ScoresConfig, protocol: ScoreProtocol, split: str = "train") -> Artifact:
    """Return the features of the training images, or of another split's; workers compute them unless they are cached.

    Raises:
        ValueError: the network's weights are missing or have another hash.
    """
    store, size, resize = work.job.store, work.recipe.data.image_size, protocol.resize
    assert resize != "none"

    def write(out: Store) -> Result:
        if work.job.anew:
            _give_up_others(work, out)
        job = FeatureJob(store, out, config.inception, resize, config.precision, size, work.job.device)
        shards = [Shard(key, count) for key, count in work.input("images").rows(split).items() if count]
        files = map_shards(functools.partial(ShardFeatures, job), shards, options=work.job.workers)
        return Result(files, {"images": sum(file.rows or 0 for file in files)}, {})

    plan = _plan(work, config, protocol, {"split": split}, {"images": work.ref("images")})
    return find_or_publish(store, plan, write)[0]


def of_samples(work: Work, config: ScoresConfig, protocol: ScoreProtocol, network: PreparedInception) -> KeptFeatures:
    """Return a meter of the samples' features; samples arrive in the order of their files."""
    decoding = work.recipe.decoding
    plan = _plan_of_codes(work, config, protocol, {}, "samples", decoding)
    shards = [Shard(key, count) for key, count in work.input("samples").rows("sample").items() if count]
    return _kept(work, protocol, network, plan, shards)


def of_reconstructions(
    work: Work, config: ScoresConfig, protocol: ScoreProtocol, network: PreparedInception, num_steps: int
) -> KeptFeatures:
    """Return a meter of the features of held-out reconstructions, which arrive in the order of the images' ids."""
    decoding = work.recipe.decoding.model_copy(update={"num_steps": num_steps})
    plan = _plan_of_codes(work, config, protocol, {"variant": SHOWN}, "codes", decoding)
    shards, ids = [], []
    for key in work.input("codes").keys("val"):
        _, rows = read_codes(work.job.store, [key])
        shown = [name for name, variant in zip(rows.image_id, rows.variant, strict=True) if variant == SHOWN]
        shards += [Shard(key, len(shown))] if shown else []
        ids += shown
    by_id = torch.tensor(sorted(range(len(ids)), key=ids.__getitem__))
    return _kept(work, protocol, network, plan, shards, by_id)


def _kept(
    work: Work,
    protocol: ScoreProtocol,
    network: PreparedInception,
    plan: ArtifactPlan,
    shards: Sequence[Shard],
    places: Tensor | None = None,
) -> KeptFeatures:
    assert protocol.resize != "none"
    facts, store = device_facts(work.job.device, IEEE), work.job.store

    def begin(out: Store) -> None:
        if work.job.anew:
            _give_up_others(work, out)
        begin_shards(out, facts)

    return KeptFeatures(network, protocol.resize, store=store, plan=plan, shards=shards, begin=begin, places=places)


def _give_up_others(work: Work, out: Store) -> None:
    give_up_others(out, work.recipe.compute.model_copy(update=IEEE.model_dump()), work.job.workers)


def _plan_of_codes(
    work: Work,
    config: ScoresConfig,
    protocol: ScoreProtocol,
    which: dict[str, JsonValue],
    codes: str,
    decoding: DecodingConfig,
) -> ArtifactPlan:
    what: dict[str, JsonValue] = {
        **which,
        "decoding": decoding.identity(),
        "micro_batch": work.recipe.encode.micro_batch,
        "seed": work.recipe.seed,
        "threads": work.recipe.threads,
    }
    return _plan(work, config, protocol, what, {each: work.ref(each) for each in (codes, "tokenizer", "teacher")})


def _plan(
    work: Work,
    config: ScoresConfig,
    protocol: ScoreProtocol,
    what: dict[str, JsonValue],
    inputs: dict[str, ArtifactRef],
) -> ArtifactPlan:
    taken: dict[str, JsonValue] = {
        "extractor": protocol.extractor,
        "extractor_sha256": protocol.extractor_sha256,
        "resize": protocol.resize,
        "precision": config.precision,
        "image_size": work.recipe.data.image_size,
        **computed(work.recipe.compute),
    }
    return ArtifactPlan(kind="features", version=VERSION, config={**taken, **what}, inputs=inputs)


def feature_shards(made: Artifact) -> Iterator[Features]:
    """Yield the features of one shard at a time, in the order of the shards."""
    for entry in made.files():
        tensors = load(made.read(entry))
        yield Features(tensors["pool"], tensors["spatial"], tensors["logits"])


def _write(out: Store, name: str, features: Features) -> FileEntry:
    parts = {"pool": features.pool, "spatial": features.spatial, "logits": features.logits}
    tensors = {key: part.contiguous() for key, part in parts.items() if part is not None}
    return write_shard(out, name, save(tensors), len(features))
