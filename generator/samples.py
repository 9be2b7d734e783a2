"""Sample a class-balanced dataset as shards of code Parquet; on one kind of device, bytes do not depend on workers.

Shapes: B sequences, N codes per sequence.
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
from generator.kinds import prepare_sampler
from generator.sampling.sampler import CodeSampler
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


class SampleSpec(NamedTuple):
    """Specification of one sample to draw."""

    class_id: int
    number: int
    """index of the sample within its class, from 0."""

    @property
    def sample_id(self) -> str:
        """Return the image id of its row."""
        return f"class-{self.class_id:05d}/sample-{self.number:06d}"


class SampleShard(NamedTuple):
    """The samples of one output file."""

    name: str
    samples: tuple[SampleSpec, ...]


@dataclass(frozen=True)
class SampleJob:
    """Arguments of a sampling job for its workers; small and picklable."""

    generator: Store
    out: Store
    config: SampleConfig
    seed: int
    identity: str
    """digest of the generator, recorded in the samples."""
    classes: tuple[int, ...] | None = None
    """classes to sample, without repetition; None: all of them, or without classes the null class."""
    device: str | None = None
    """device to sample on; None: a GPU if the worker has one."""
    numerics: NumericsConfig = IEEE


def plan_shards(space: CodeSpace, config: SampleConfig, classes: Sequence[int] | None = None) -> list[SampleShard]:
    """Plan `per_class` samples of every class (without classes: of the null class), split into shards; deterministic.

    Raises:
        ValueError: a class does not exist or is repeated.
    """
    if classes is None:
        classes = range(space.num_classes) if space.num_classes else [space.null_class]
    elif wrong := [c for c in classes if not 0 <= c < space.num_classes]:
        raise ValueError(f"class id {wrong[0]} is not among {space.num_classes} classes: leave it out")
    elif len(set(classes)) < len(classes):
        raise ValueError(f"classes = {tuple(classes)} has some twice: name each once, and raise per_class instead")
    samples = [SampleSpec(c, i) for i in range(config.per_class) for c in classes]
    starts = range(0, len(samples), config.samples_per_shard)
    return [
        SampleShard(shard_name("sample", n, len(starts)), tuple(samples[start : start + config.samples_per_shard]))
        for n, start in enumerate(starts)
    ]


class ShardSampler:
    """Worker that holds the generator and draws one shard per call."""

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
        """Draw a shard, or return the entry of a finished one."""
        done = shard_entry(self.job.out, shard.name)
        if done is not None:
            return done
        codes_BN = draw_samples(self.sampler, shard.samples, self.config.micro_batch, seed=self.job.seed)
        classes = [s.class_id if s.class_id < self.space.num_classes else NO_CLASS for s in shard.samples]
        rows = CodeRows(
            image_id=[s.sample_id for s in shard.samples],
            class_id=np.array(classes, np.int32),
            variant=[VARIANT] * len(shard.samples),
            codes=codes_BN.numpy().astype(self.info.dtype),
        )
        return write_shard(self.job.out, shard.name, to_parquet(self.info, rows), len(shard.samples))


def draw_samples(sampler: CodeSampler, samples: Sequence[SampleSpec], micro_batch: int, *, seed: int) -> Tensor:
    """Draw samples, codes (B, N) int64 on the CPU; each depends only on class, number, seed and `micro_batch`.

    Incomplete micro-batches are padded with their last sample: matrix products of other shapes round differently.
    """
    codes = []
    for start in range(0, len(samples), micro_batch):
        part = samples[start : start + micro_batch]
        padded = [*part, *[part[-1]] * (micro_batch - len(part))]
        uniform = torch.stack([_uniform(s, sampler.numbers, seed) for s in padded])
        codes.append(sampler(torch.tensor([s.class_id for s in padded]), uniform)[: len(part)])
    return torch.cat(codes).cpu()  # only here, so that the next batch's numbers are drawn while a GPU is busy


def _uniform(sample: SampleSpec, numbers: tuple[int, ...], seed: int) -> Tensor:
    """Draw the numbers that determine a sample, from its class, its number and the seed only; float64."""
    generator = torch.Generator().manual_seed(seed_of(seed, "sample", sample.class_id, sample.number))
    return torch.rand(numbers, generator=generator, dtype=torch.float64)


def share_changed(
    sampler: CodeSampler, samples: Sequence[SampleSpec], micro_batches: tuple[int, int], *, seed: int
) -> float:
    """Return the share of samples that change in any code when micro-batches have another size.

    Matrix products of another shape sum in another order. If two codes are almost equally likely, or a number falls on
    the boundary between two, the other one may be drawn; the rest is then another sample of the same distribution.
    """
    first, second = (draw_samples(sampler, samples, size, seed=seed) for size in micro_batches)
    return (first != second).any(1).double().mean().item()


def generate(job: SampleJob, *, options: WorkerOptions, progress: Progress = silent) -> list[FileEntry]:
    """Draw all shards and return their entries, in order.

    Raises:
        ValueError: an existing shard has the wrong number of samples.
    """
    space = space_of(load_config(job.generator, GeneratorFile).codes)
    shards = plan_shards(space, job.config, job.classes)
    files = map_shards(functools.partial(ShardSampler, job), shards, options=options, progress=progress)
    for file, shard in zip(files, shards, strict=True):
        if file.rows != (expected := len(shard.samples)):
            problem = f"{job.out.uri}/{file.path} has {file.rows} samples of {expected}"
            raise ValueError(f"{problem}: delete it and its .json file, and run again")
    return files
