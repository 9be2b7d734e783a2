"""Inception features of many images, one file for each shard, and kept: whoever scores alike finds them again.

Of real images, what others are compared with, Ray workers take them, resumed by shards. Of samples and reconstructions
they are taken as the decoded images pass by everything that measures them, since decoding costs more than all else.
An artifact `features` is named by images, the extractor's hash, the resize and the precision.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from pydantic import JsonValue
from safetensors.torch import load, save
from torch import Tensor

from flows.recipes.schema import ScoresConfig
from flows.stage import Work, computed, give_up_others
from infra.artifacts.made_on import begin_shards
from infra.artifacts.manifest import ArtifactRef, Manifest, Plan, find, folder_of, key_of, publish
from infra.artifacts.pretrained import PretrainedConfig
from infra.artifacts.shards import FileEntry, shard_entry, write_shard
from infra.codes.contract import read_codes
from infra.compute.device import IEEE, device_facts, use_numerics
from infra.compute.workers import map_shards
from infra.store.store import Store
from sftok.config import DecodingConfig
from sftok.images.resize import Resize
from sftok.images.stored import StoredImages
from sftok.metrics.inception.prepared import PreparedInception, prepare_inception
from sftok.metrics.inception.weights import read_inception
from sftok.metrics.measure import Features
from sftok.metrics.protocols import ScoreProtocol

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
class FeatureJob:
    """What every worker needs; small and picklable."""

    store: Store
    out: Store
    inception: PretrainedConfig
    resize: Resize
    precision: str
    image_size: int
    device: str


class ShardFeatures:
    """A worker: holds the network, takes the features of one shard of images a call, some in memory at a time."""

    def __init__(self, job: FeatureJob) -> None:
        self.job = job
        use_numerics(IEEE, job.device)
        begin_shards(job.out, device_facts(job.device, IEEE))
        network = read_inception(job.inception, job.store, "evaluate.scores.inception")
        self.network = prepare_inception(network, precision=job.precision, device=job.device)

    def __call__(self, shard: Shard) -> FileEntry:
        """Take the features of a shard; one that is done is not done again."""
        if (done := shard_entry(self.job.out, shard.name)) is not None:
            return done
        images = StoredImages(self.job.store, {shard.key: shard.rows}, self.job.image_size)
        batches = images.split(max(BATCH, self.network.batches.whole))
        return _write(
            self.job.out, shard.name, joined(features_of(self.network, some, self.job.resize) for some in batches)
        )


class PassingFeatures:
    """Features of images that pass, taken with a network."""

    def __init__(self, network: PreparedInception, resize: Resize) -> None:
        self.network, self.resize = network, resize
        self._parts: list[Features] = []

    def add(self, images: Tensor) -> None:
        """See the next uint8 images (n, 3, S, S), on any device."""
        self._parts.append(features_of(self.network, images, self.resize))

    def features(self) -> Features:
        """Those of all images so far."""
        return joined(self._parts)


class KeptFeatures(PassingFeatures):
    """The same of decoded images, kept as an artifact; where they were taken before, images pass unseen."""

    def __init__(
        self,
        network: PreparedInception,
        resize: Resize,
        *,
        store: Store,
        plan: Plan,
        shards: Sequence[Shard],
        facts: Mapping[str, str],
        places: Tensor | None = None,
    ) -> None:
        """Look whether they are in the store.

        Args:
            network: what takes them.
            resize: how images come to the network's size.
            store: where they are kept.
            plan: what identifies them.
            shards: the files that are written.
            facts: of the device that computes them.
            places: where in the files each image lies; by default they come in the files' order.
        """
        super().__init__(network, resize)
        self.store, self.plan, self.shards, self.facts, self.places = store, plan, shards, facts, places
        self._made = find(store, plan)

    def add(self, images: Tensor) -> None:
        """See the next uint8 images (n, 3, S, S), on any device."""
        if self._made is None:
            super().add(images)

    def features(self) -> Features:
        """Those of all images, in the order of the files.

        Raises:
            ValueError: fewer images passed than the files are to have.
        """
        if self._made is None:
            self._made = self._publish(super().features())
        return joined(feature_shards(self.store, self._made))

    def _publish(self, found: Features) -> Manifest:
        if len(found) != sum(shard.rows for shard in self.shards):
            raise ValueError(f"{len(found)} images passed, of {sum(shard.rows for shard in self.shards)}")
        if self.places is not None:
            found = found.rows(torch.argsort(self.places))
        out, files, at = folder_of(self.store, self.plan.kind, self.plan.digest), [], 0
        begin_shards(out, self.facts)
        for shard in self.shards:
            some = found.rows(torch.arange(at, at + shard.rows))
            files.append(shard_entry(out, shard.name) or _write(out, shard.name, some))
            at += shard.rows
        return publish(self.store, self.plan, files=files, counts={"images": len(found)}, metrics={}, seconds=0)


def features_of(network: PreparedInception, images: Tensor, how: Resize) -> Features:
    """Features of uint8 images (n, 3, S, S), in memory of this machine."""
    made = [network(batch, how) for batch in images.split(max(BATCH, network.batches.whole))]
    return joined(Features(one.pool.cpu(), one.spatial.cpu(), one.logits.cpu()) for one in made)


def joined(parts: Iterable[Features]) -> Features:
    """Features one after the other; each is copied once.

    Raises:
        ValueError: there are none.
    """
    pool, spatial, logits = zip(*((part.pool, part.spatial, part.logits) for part in parts), strict=True)
    return Features(torch.cat(pool), torch.cat(spatial), torch.cat(logits))


def of_real_images(work: Work, config: ScoresConfig, protocol: ScoreProtocol, split: str = "train") -> Manifest:
    """Features of the training images, or of those that are held out, found or taken by workers.

    Raises:
        ValueError: the network's weights are not there, or are others.
    """
    store, inputs = work.job.store, {"images": work.ref("images")}
    plan = _plan(work, config, protocol, {"split": split}, inputs)
    if (made := find(store, plan)) is not None:
        return made
    assert protocol.resize != "none"
    out, size = folder_of(store, plan.kind, plan.digest), work.recipe.data.image_size
    if work.job.anew:
        _give_up_others(work, out)
    job = FeatureJob(store, out, config.inception, protocol.resize, config.precision, size, work.job.device)
    shards = [Shard(key, count) for key, count in work.rows("images", split).items() if count]
    files = map_shards(functools.partial(ShardFeatures, job), shards, options=work.job.workers)
    counts = {"images": sum(file.rows or 0 for file in files)}
    return publish(store, plan, files=files, counts=counts, metrics={}, seconds=0)


def of_samples(work: Work, config: ScoresConfig, protocol: ScoreProtocol, network: PreparedInception) -> KeptFeatures:
    """What takes the features of the samples as they pass, in the order of their files."""
    decoding = work.recipe.decoding
    plan = _plan_of_codes(work, config, protocol, {}, "samples", decoding)
    shards = [Shard(key, count) for key, count in work.rows("samples", "sample").items() if count]
    return _kept(work, protocol, network, plan, shards)


def of_reconstructions(
    work: Work, config: ScoresConfig, protocol: ScoreProtocol, network: PreparedInception, num_steps: int
) -> KeptFeatures:
    """What takes those of the held-out images' reconstructions as they pass, in the order of the images' ids."""
    decoding = work.recipe.decoding.model_copy(update={"num_steps": num_steps})
    plan = _plan_of_codes(work, config, protocol, {"variant": SHOWN}, "codes", decoding)
    shards, ids = [], []
    for key in work.keys("codes", "val"):
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
    plan: Plan,
    shards: Sequence[Shard],
    places: Tensor | None = None,
) -> KeptFeatures:
    assert protocol.resize != "none"
    facts = device_facts(work.job.device, IEEE)
    store = work.job.store
    if work.job.anew:
        _give_up_others(work, folder_of(store, plan.kind, plan.digest))
    return KeptFeatures(network, protocol.resize, store=store, plan=plan, shards=shards, facts=facts, places=places)


def _give_up_others(work: Work, out: Store) -> None:
    give_up_others(out, work.recipe.compute.model_copy(update=IEEE.model_dump()), work.job.workers)


def _plan_of_codes(
    work: Work,
    config: ScoresConfig,
    protocol: ScoreProtocol,
    which: dict[str, JsonValue],
    codes: str,
    decoding: DecodingConfig,
) -> Plan:
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
) -> Plan:
    taken: dict[str, JsonValue] = {
        "extractor": protocol.extractor,
        "extractor_sha256": protocol.extractor_sha256,
        "resize": protocol.resize,
        "precision": config.precision,
        "image_size": work.recipe.data.image_size,
        **computed(work.recipe.compute),
    }
    return Plan(kind="features", version=VERSION, config={**taken, **what}, inputs=inputs)


def feature_shards(store: Store, made: Manifest) -> Iterator[Features]:
    """Features of one shard at a time, in the order of the shards."""
    for entry in made.files:
        tensors = load(store.read(key_of(made, entry)))
        yield Features(tensors["pool"], tensors["spatial"], tensors["logits"])


def _write(out: Store, name: str, features: Features) -> FileEntry:
    parts = {"pool": features.pool, "spatial": features.spatial, "logits": features.logits}
    tensors = {key: part.contiguous() for key, part in parts.items() if part is not None}
    return write_shard(out, name, save(tensors), len(features))
