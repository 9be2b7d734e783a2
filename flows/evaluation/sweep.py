"""Sweep over guidance scales and temperatures: class accuracy of the samples, and seconds per sample.

It covers the generator that drew the run's samples and, side by side, a second one that was trained on the same codes.
"""

import json
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from flows.results.types import SweepPoint, SweepRow
from flows.stage import Work
from generator.artifacts import load_generator
from generator.code_space import CodeSpace
from generator.config import SampleConfig
from generator.kinds import prepare
from generator.samples import SampleSpec, draw_samples
from generator.sampling.prepared import PreparedGenerator
from infra.artifacts.manifest import Manifest
from infra.artifacts.shards import FileEntry, put
from infra.store.store import Store
from sftok.coding.decode import ImageDecoder
from sftok.metrics.class_reader import ClassReader, accuracy
from sftok.weights.artifacts import load_teacher, load_tokenizer

SWEEP = "sweep.json"
# Beside the artifact, not part of it: an artifact has the same bytes whenever it is made, and times differ.
SECONDS = "sweep_seconds.json"
DRAWS = 2  # the first one chooses kernels; the faster one is timed


class SweepEntry(NamedTuple):
    """One generator of the sweep, and the settings that it is sampled with."""

    name: str
    """its kind; a second generator of the same kind is marked as the second."""
    model: PreparedGenerator
    space: CodeSpace
    config: SampleConfig
    """the sampling settings that are not swept."""
    temperatures: tuple[float, ...]


def sweep(work: Work, reader: ClassReader) -> FileEntry:
    """Sample, decode and read every setting of the sweep; write the points, and beside them the times."""
    decoder, points, seconds = _decoder(work), [], []
    for entry in _entries(work):
        for config in _settings(work, entry):
            codes, wanted, taken = _draw(work, entry, config)
            images = decoder(codes, [each.sample_id for each in wanted], work.recipe.decoding).images
            classes = torch.tensor([each.class_id for each in wanted])
            points.append(
                SweepPoint(
                    generator=entry.name,
                    cfg_scale=config.cfg_scale,
                    temperature=config.temperature,
                    samples=len(wanted),
                    class_accuracy=accuracy(reader.read(images), classes),
                )
            )
            seconds.append(taken / len(wanted))
    text = json.dumps([point.as_json() for point in points], indent=1)
    work.out.write(SECONDS, json.dumps(seconds).encode())
    return put(work.out, SWEEP, text.encode())


def read_sweep(folder: Store, evaluation: Manifest) -> tuple[SweepRow, ...]:
    """Return the rows of an evaluation's sweep, with the times of the machine where it ran; none without a sweep."""
    if SWEEP not in {file.path for file in evaluation.files}:
        return ()
    points = [SweepPoint.model_validate(point) for point in json.loads(folder.read(SWEEP))]
    seconds = json.loads(folder.read(SECONDS)) if folder.exists(SECONDS) else [None] * len(points)
    return tuple(
        SweepRow(**point.model_dump(), seconds_per_image=taken) for point, taken in zip(points, seconds, strict=True)
    )


def _entries(work: Work) -> Iterator[SweepEntry]:
    """Yield the run's generator, then the second one if the recipe has one."""
    sweep, sample = work.recipe.evaluate.sweep, work.recipe.sample
    generators = [(work.input("samples").input("generator"), sample)]
    if work.recipe.second is not None:
        own = SampleConfig(precision=sample.precision, compile=sample.compile, micro_batch=sample.micro_batch)
        generators.append((work.input("second_generator"), own))
    first = ""
    for artifact, config in generators:
        model, _ = load_generator(artifact.folder)
        kind = model.config.kind
        name = kind if kind != first else f"{kind}, the second"
        first = kind
        yield SweepEntry(
            name, prepare(model.to(work.job.device), config), model.space, config, sweep.temperatures_of(kind)
        )


def _settings(work: Work, entry: SweepEntry) -> Iterator[SampleConfig]:
    """Yield every temperature with every guidance scale, in micro-batches of equal size so that none is padded."""
    sweep = work.recipe.evaluate.sweep
    count = sweep.per_class * max(entry.space.num_classes, 1)
    parts = -(-count // entry.config.micro_batch)
    fixed = {"per_class": sweep.per_class, "micro_batch": -(-count // parts)}
    for temperature in entry.temperatures:
        for cfg_scale in sweep.cfg_scales:
            yield entry.config.model_copy(update={**fixed, "temperature": temperature, "cfg_scale": cfg_scale})


def _draw(work: Work, entry: SweepEntry, config: SampleConfig) -> tuple[Tensor, list[SampleSpec], float]:
    """Draw codes (B, N), class-balanced; return them with what they are samples of and the seconds that it took."""
    sampler = entry.model.sampler(config)
    wanted = [SampleSpec(c, i) for c in range(entry.space.num_classes) for i in range(config.per_class)]
    seconds = []
    for _ in range(DRAWS):
        began = time.perf_counter()
        codes = draw_samples(sampler, wanted, config.micro_batch, seed=work.recipe.seed)
        seconds.append(time.perf_counter() - began)
    return codes, wanted, min(seconds)


def _decoder(work: Work) -> ImageDecoder:
    recipe, device = work.recipe, work.job.device
    teacher, model = (
        load_teacher(work.input("teacher").folder).to(device),
        load_tokenizer(work.input("tokenizer").folder).to(device),
    )
    precision = recipe.decoding.arithmetic
    return ImageDecoder(model, teacher, micro_batch=recipe.encode.micro_batch, seed=recipe.seed, precision=precision)
