"""The sweep: how often samples show their class at each guidance and temperature, and how long it takes to draw one.

Of the generator that drew the run's samples and, side by side, of a second one of the same codes. The second one is an
artifact like any other: what another recipe has trained alike is found, not trained again.
"""

import json
import logging
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flows.results.types import SweepPoint, SweepRow
from flows.stage import Job, Result, Stage, Work, plan_of
from generator.artifacts import load_generator
from generator.autoregressive import Generator
from generator.code_space import CodeSpace
from generator.config import GeneratorKind, SampleConfig
from generator.masked import MaskedGenerator
from generator.sampling.prepared import Prepared
from generator.sampling.shards import Wanted, draw_samples
from infra.artifacts.made_on import note
from infra.artifacts.manifest import Manifest, find, folder_of, manifest_of, publish
from infra.artifacts.shards import put
from infra.compute.device import device_facts
from infra.progress import silent
from infra.store.store import Store
from infra.training.checkpoint import CHECKPOINTS, Checkpoints
from sftok.coding.decode import ImageDecoder
from sftok.images.stored import StoredImages
from sftok.metrics.class_reader import ClassReader, accuracy, thumbnails
from sftok.weights.artifacts import load_teacher, load_tokenizer

log = logging.getLogger(__name__)

SWEEP = "sweep.json"
# Beside the artifact, not part of it: artifacts are the same bytes whenever they are made, and times are not.
SECONDS = "sweep_seconds.json"
DRAWS = 2  # the first one chooses kernels; the time is that of the faster one
_BATCH = 64  # training images that are looked at at once


class Swept(NamedTuple):
    """A generator of the sweep."""

    name: str
    """its kind; a second one of the same kind is called so."""
    model: Prepared
    space: CodeSpace
    config: SampleConfig
    """what of the sampling stays as it is."""
    temperatures: tuple[float, ...]


def with_sweep(work: Work, measured: Result, train: Stage) -> Result:
    """Add the sweep, if the recipe asks for one, to what the evaluate stage has measured."""
    if not work.recipe.evaluate.sweep.cfg_scales:
        return measured
    torch.set_num_threads(work.recipe.threads)
    reader, decoder, points, seconds = _reader(work), _decoder(work), [], []
    for swept in _generators(work, train):
        for config in _settings(work, swept):
            codes, wanted, taken = _drawn(work, swept, config)
            images = decoder(codes, [each.sample_id for each in wanted], work.recipe.decoding).images
            classes = torch.tensor([each.class_id for each in wanted])
            points.append(
                SweepPoint(
                    generator=swept.name,
                    cfg_scale=config.cfg_scale,
                    temperature=config.temperature,
                    samples=len(wanted),
                    class_accuracy=accuracy(reader.read(images), classes),
                )
            )
            seconds.append(taken / len(wanted))
    text = json.dumps([point.as_json() for point in points], indent=1)
    work.out.write(SECONDS, json.dumps(seconds).encode())
    return measured._replace(files=[*measured.files, put(work.out, SWEEP, text.encode())])


def read_sweep(folder: Store, evaluation: Manifest) -> tuple[SweepRow, ...]:
    """The rows of an evaluation's sweep, with the times of the machine where it ran; none where there was no sweep."""
    if SWEEP not in {file.path for file in evaluation.files}:
        return ()
    points = [SweepPoint.model_validate(point) for point in json.loads(folder.read(SWEEP))]
    seconds = json.loads(folder.read(SECONDS)) if folder.exists(SECONDS) else [None] * len(points)
    return tuple(
        SweepRow(**point.model_dump(), seconds_per_image=taken) for point, taken in zip(points, seconds, strict=True)
    )


def _generators(work: Work, train: Stage) -> Iterator[Swept]:
    """The run's generator, then the second one where the recipe has one."""
    sweep, sample, store = work.recipe.evaluate.sweep, work.recipe.sample, work.job.store
    temperatures: dict[GeneratorKind, tuple[float, ...]] = {
        "autoregressive": sweep.temperatures,
        "masked": sweep.masked_temperatures,
    }
    ref = manifest_of(store, work.ref("samples")).inputs["generator"]
    model, _ = load_generator(folder_of(store, ref.kind, ref.digest))
    first = model.config.kind
    yield Swept(first, _prepared(model, sample, work.job.device), model.space, sample, temperatures[first])
    if sweep.generator is None:
        return
    manifest = _second(work, train)
    model, _ = load_generator(folder_of(store, manifest.kind, manifest.digest))
    kind = model.config.kind
    name = kind if kind != first else f"{kind}, the second"
    config = SampleConfig(precision=sample.precision, compile=sample.compile, micro_batch=sample.micro_batch)
    yield Swept(name, _prepared(model, config, work.job.device), model.space, config, temperatures[kind])


def _prepared(model: Generator | MaskedGenerator, config: SampleConfig, device: str) -> Prepared:
    return Prepared(model.to(device), config.arithmetic, compile=bool(config.compile))


def _second(work: Work, train: Stage) -> Manifest:
    """The second generator: what the stage `train` makes of these codes with the sweep's settings."""
    sweep, store = work.recipe.evaluate.sweep, work.job.store
    changes = {"generator": sweep.generator, "train_generator": sweep.train_generator}
    job: Job = work.job._replace(recipe=work.recipe.model_copy(update=changes), ranks=1)
    plan = plan_of(train, job, {"codes": work.ref("codes")})
    if (found := find(store, plan)) is not None:
        return found
    log.info("sweep: training the second generator, which the store has none like")
    began, out = time.monotonic(), folder_of(store, plan.kind, plan.digest)
    note(out, device_facts(job.device, job.recipe.compute.numerics))
    made = train.call(Work(job, plan, out, silent))
    taken = round(time.monotonic() - began, 3)
    manifest = publish(store, plan, files=made.files, counts=made.counts, metrics=made.metrics, seconds=taken)
    Checkpoints(out.at(CHECKPOINTS)).clear()
    return manifest


def _settings(work: Work, swept: Swept) -> Iterator[SampleConfig]:
    """Every temperature with every guidance, in equal micro-batches so that none is filled up."""
    sweep = work.recipe.evaluate.sweep
    count = sweep.per_class * max(swept.space.num_classes, 1)
    parts = -(-count // swept.config.micro_batch)
    fixed = {"per_class": sweep.per_class, "micro_batch": -(-count // parts)}
    for temperature in swept.temperatures:
        for cfg_scale in sweep.cfg_scales:
            yield swept.config.model_copy(update={**fixed, "temperature": temperature, "cfg_scale": cfg_scale})


def _drawn(work: Work, swept: Swept, config: SampleConfig) -> tuple[Tensor, list[Wanted], float]:
    """Codes (B, N) of every class equally often, what they are samples of, and the seconds that drawing them takes."""
    sampler = swept.model.sampler(config)
    wanted = [Wanted(c, i) for c in range(swept.space.num_classes) for i in range(config.per_class)]
    seconds = []
    for _ in range(DRAWS):
        began = time.perf_counter()
        codes = draw_samples(sampler, wanted, config.micro_batch, seed=work.recipe.seed)
        seconds.append(time.perf_counter() - began)
    return codes, wanted, min(seconds)


def _decoder(work: Work) -> ImageDecoder:
    recipe, device = work.recipe, work.job.device
    teacher, model = (
        load_teacher(work.folder("teacher")).to(device),
        load_tokenizer(work.folder("tokenizer")).to(device),
    )
    precision = recipe.decoding.arithmetic
    return ImageDecoder(model, teacher, micro_batch=recipe.encode.micro_batch, seed=recipe.seed, precision=precision)


def _reader(work: Work) -> ClassReader:
    """The evaluation's class reader: taught by the same images in the same order."""
    recipe = work.recipe
    train = StoredImages(work.job.store, work.rows("images", "train"), recipe.data.image_size)
    rows = train.sample(recipe.evaluate.classifier_images, recipe.seed)
    is_kept = torch.zeros(len(train), dtype=torch.bool)
    is_kept[rows] = True
    kept, at = [], 0
    for batch in train.split(_BATCH):
        if (here := is_kept[at : at + len(batch)]).any():
            kept.append(thumbnails(batch[here]))
        at += len(batch)
    order = torch.argsort(torch.argsort(rows)).numpy()
    return ClassReader.fit_thumbnails(np.concatenate(kept)[order], train.labels()[rows])
