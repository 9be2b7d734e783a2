"""A balanced set of samples as shards of code Parquet: on one kind of device the same bytes for any number of workers.

Shapes: B sequences, N codes a sequence.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from generator.artifacts import GeneratorFile, load_generator
from generator.code_space import CodeSpace
from generator.config import SampleConfig
from generator.data import space_of
from generator.sampling.autoregressive import Sampler
from generator.sampling.masked import MaskedSampler
from generator.sampling.prepared import prepare_sampler
from infra.artifacts.made_on import begin_shards
from infra.artifacts.shards import FileEntry, shard_entry, shard_name, write_shard
from infra.artifacts.weights import load_config
from infra.codes.contract import NO_CLASS, CodeRows, to_parquet
from infra.compute.device import IEEE, NumericsConfig, default_device, device_facts, use_numerics
from infra.compute.workers import WorkerOptions, map_shards
from infra.progress import Progress, silent
from infra.store.store import Store
from infra.training.loop import seed_of

VARIANT = "sample"


class Wanted(NamedTuple):
    """One sample that is to be drawn."""

    class_id: int
    number: int
    """which sample of its class, from 0."""

    @property
    def sample_id(self) -> str:
        """The id of its row."""
        return f"class-{self.class_id:05d}/sample-{self.number:06d}"


class SampleShard(NamedTuple):
    """The samples of one output file."""

    name: str
    wanted: tuple[Wanted, ...]


@dataclass(frozen=True)
class SampleJob:
    """What every worker of one sampling needs; small and picklable."""

    generator: Store
    out: Store
    config: SampleConfig
    seed: int
    identity: str
    """digest of the generator, noted in the samples."""
    classes: tuple[int, ...] | None = None
    """which classes to draw, each once; None: all of them, or without classes the null class."""
    device: str | None = None
    """where to compute; None: on a GPU where a worker has one."""
    numerics: NumericsConfig = IEEE


def plan_shards(space: CodeSpace, config: SampleConfig, classes: Sequence[int] | None = None) -> list[SampleShard]:
    """Every class `per_class` times (without classes: the null class), cut into shards; fixed by the arguments alone.

    Raises:
        ValueError: there is no such class, or one comes twice.
    """
    if classes is None:
        classes = range(space.num_classes) if space.num_classes else [space.null_class]
    elif wrong := [c for c in classes if not 0 <= c < space.num_classes]:
        raise ValueError(f"class id {wrong[0]} is not among {space.num_classes} classes: leave it out")
    elif len(set(classes)) < len(classes):
        raise ValueError(f"classes = {tuple(classes)} has some twice: name each once, and raise per_class instead")
    wanted = [Wanted(c, i) for i in range(config.per_class) for c in classes]
    cuts = range(0, len(wanted), config.samples_per_shard)
    return [
        SampleShard(shard_name("sample", n, len(cuts)), tuple(wanted[cut : cut + config.samples_per_shard]))
        for n, cut in enumerate(cuts)
    ]


class ShardSampler:
    """A worker: holds the generator, draws one shard a call."""

    def __init__(self, job: SampleJob) -> None:
        self.job, device = job, job.device or default_device()
        use_numerics(job.numerics, device)
        begin_shards(job.out, device_facts(device, job.numerics))
        self.config = job.config.on(device)
        model, info = load_generator(job.generator)
        self.space = model.space
        self.sampler = prepare_sampler(model.to(device), self.config)
        settings = {"generator": job.identity, "seed": job.seed, **self.config.as_json()}
        if job.classes is not None:
            settings["classes"] = list(job.classes)
        self.info = info.model_copy(update={"sampling": settings})

    def __call__(self, shard: SampleShard) -> FileEntry:
        """Draw a shard; one that is done is not done again."""
        done = shard_entry(self.job.out, shard.name)
        if done is not None:
            return done
        codes_BN = draw_samples(self.sampler, shard.wanted, self.config.micro_batch, seed=self.job.seed)
        classes = [w.class_id if w.class_id < self.space.num_classes else NO_CLASS for w in shard.wanted]
        rows = CodeRows(
            image_id=[w.sample_id for w in shard.wanted],
            class_id=np.array(classes, np.int32),
            variant=[VARIANT] * len(shard.wanted),
            codes=codes_BN.numpy().astype(self.info.dtype),
        )
        return write_shard(self.job.out, shard.name, to_parquet(self.info, rows), len(shard.wanted))


def draw_samples(sampler: Sampler | MaskedSampler, wanted: Sequence[Wanted], micro_batch: int, *, seed: int) -> Tensor:
    """Draw samples, codes (B, N) int64 on the CPU; each depends on its class, its number, the seed and `micro_batch`.

    Micro-batches are filled up with their last sample: products of other shapes would round otherwise.
    """
    codes = []
    for at in range(0, len(wanted), micro_batch):
        part = wanted[at : at + micro_batch]
        filled = [*part, *[part[-1]] * (micro_batch - len(part))]
        uniform = torch.stack([_uniform(w, sampler.numbers, seed) for w in filled])
        codes.append(sampler(torch.tensor([w.class_id for w in filled]), uniform)[: len(part)])
    return torch.cat(codes).cpu()  # once: while a GPU draws one, the numbers of the next are made


def _uniform(wanted: Wanted, numbers: tuple[int, ...], seed: int) -> Tensor:
    """The numbers that decide a sample, from its class, its number and the seed alone; float64."""
    generator = torch.Generator().manual_seed(seed_of(seed, "sample", wanted.class_id, wanted.number))
    return torch.rand(numbers, generator=generator, dtype=torch.float64)


def share_changed(
    sampler: Sampler | MaskedSampler, wanted: Sequence[Wanted], micro_batches: tuple[int, int], *, seed: int
) -> float:
    """Share of samples with another code somewhere when they are drawn in micro-batches of another size.

    Products of another shape add up in another order; where two codes are about as likely, or a number falls on the
    border between two, the other one is drawn, and what follows is another sample of the same distribution.
    """
    first, second = (draw_samples(sampler, wanted, size, seed=seed) for size in micro_batches)
    return (first != second).any(1).double().mean().item()


def generate(job: SampleJob, *, options: WorkerOptions, progress: Progress = silent) -> list[FileEntry]:
    """Draw all shards; entries in the order of the shards.

    Raises:
        ValueError: a shard that was there has another number of samples than it should.
    """
    space = space_of(load_config(job.generator, GeneratorFile).codes)
    shards = plan_shards(space, job.config, job.classes)
    files = map_shards(functools.partial(ShardSampler, job), shards, options=options, progress=progress)
    for file, shard in zip(files, shards, strict=True):
        if file.rows != (wanted := len(shard.wanted)):
            there = f"{job.out.uri}/{file.path} has {file.rows} samples of {wanted}"
            raise ValueError(f"{there}: delete it and its .json file, and run again")
    return files
