"""`sftok sample`: draw codes from a generator of the store, an artifact like the pipeline's; decode images on request.

Images are decoded a micro-batch at a time and written at once: 50,000 of them take no more memory than 50.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from pydantic import JsonValue

from flows.evaluation.gallery import name_of
from flows.inference.classes import chosen_classes
from flows.inference.files import (
    ImageBatch,
    Outputs,
    check_names,
    image_writer,
    is_unfinished,
    marked_unfinished,
    picture_file,
)
from flows.inference.tokenizer import Choice, DecodingModels, decoding_device, decoding_models, decoding_precision
from flows.make import find_or_publish
from flows.outputs import new_files
from flows.pipeline.generator import SAMPLE, samples_result
from flows.recipes.schema import ComputeConfig
from flows.requests.choose_device import choose_device
from flows.requests.precisions import warn_of_slow
from flows.runs.run_request import usual_workers
from flows.stage import Result, computed, give_up_others
from generator.artifacts import GeneratorFile
from generator.config import SampleConfig
from generator.data import space_of
from generator.samples import SampleJob, SampleSpec, generate, plan_shards
from infra.artifacts.artifact import Artifact
from infra.artifacts.lineage import find_artifact
from infra.artifacts.manifest import ArtifactPlan, ArtifactRef, find
from infra.artifacts.weights import load_config
from infra.codes.contract import CodesInfo, read_codes
from infra.compute.cluster import check_reachable, session
from infra.compute.workers import WorkerOptions
from infra.progress import Progress
from infra.settings import Settings
from infra.store.store import Store
from sftok.config import DecodingConfig

SHEET_CLASSES, SHEET_SAMPLES = 20, 10  # on a contact sheet, at most: classes, and samples of each


class SampleArguments(NamedTuple):
    """The arguments of `sftok sample`, not checked yet."""

    generator: str
    """reference of an artifact."""
    config: SampleConfig
    seed: int
    classes: Sequence[str] = ()
    """ids, ranges of ids and names, several in one string with commas; none: all classes."""
    outputs: Outputs = Outputs()
    decode_steps: int = 8
    store: str | None = None
    workers: int | None = None
    gpus_per_worker: float | None = None
    """None: 1 on CUDA."""
    choice: Choice = Choice()
    """of the tokenizer that decodes the samples to images."""
    compute: ComputeConfig = ComputeConfig()
    anew: bool = False
    """whether unfinished samples of another kind of device are discarded."""


class SampleRequest(NamedTuple):
    """Checked arguments, with the generator that they name."""

    arguments: SampleArguments
    generator: Artifact
    info: CodesInfo
    """tokenizer, codebook size and class names of the generator's codes."""
    classes: tuple[int, ...] | None
    """class ids in order; None: all, or the generator has none."""
    options: WorkerOptions

    @property
    def models(self) -> DecodingModels:
        """The models that decode the samples to images; a ValueError if the store does not have them."""
        return decoding_models(self.generator, self.arguments.choice)

    @property
    def pictures(self) -> dict[str, Path]:
        """The files in the folder of pictures, by sample id; none if no folder was asked for."""
        folder = self.arguments.outputs.folder
        if folder is None:
            return {}
        ids = [sample.sample_id for shard in self.shards for sample in shard]
        return {sample_id: picture_file(folder, sample_id) for sample_id in ids}

    @property
    def settings(self) -> dict[str, JsonValue]:
        """The settings that decide the pixels."""
        models, precision = self.models, decoding_precision(decoding_device(self.arguments.compute.device))
        rounded: dict[str, JsonValue] = {} if precision == "fp32" else {"precision": precision}
        return {
            **rounded,
            "samples": self.plan.digest,
            "tokenizer": models.tokenizer.ref.digest,
            "teacher": None if models.teacher is None else models.teacher.ref.digest,
            "decode_steps": self.arguments.decode_steps,
            "micro_batch": self.arguments.config.micro_batch,
        }

    @property
    def shards(self) -> list[tuple[SampleSpec, ...]]:
        """The samples of every shard."""
        shards = plan_shards(space_of(self.info), self.arguments.config, self.classes)
        return [shard.samples for shard in shards]

    @property
    def plan(self) -> ArtifactPlan:
        """The plan that identifies the samples; for all classes it is the pipeline's with the same settings."""
        some: dict[str, JsonValue] = {} if self.classes is None else {"classes": list(self.classes)}
        config = {"sample": self.arguments.config.as_json(), "seed": self.arguments.seed, **some}
        config["threads"] = self.options.threads_per_worker
        config |= computed(self.arguments.compute)
        return ArtifactPlan(
            kind=SAMPLE.kind, version=SAMPLE.version, config=config, inputs={"generator": self.generator.ref}
        )


class SampleResult(NamedTuple):
    """The artifact that samples were published as, and the files that were written from it."""

    ref: ArtifactRef
    state: str
    """Completed, or Cached if they were drawn before."""
    generator: ArtifactRef
    classes: tuple[int, ...]
    """none if the generator has none."""
    per_class: int
    samples: int
    outputs: Outputs

    def as_json(self) -> dict[str, JsonValue]:
        """Return one JSON object; references are kind/digest, paths are strings, null if not asked for."""
        folder, sheet, npz = (None if path is None else str(path) for path in self.outputs)
        return {
            "samples": str(self.ref),
            "uri": self.ref.uri,
            "state": self.state,
            "generator": str(self.generator),
            "classes": list(self.classes),
            "per_class": self.per_class,
            "count": self.samples,
            "images": folder,
            "grid": sheet,
            "npz": npz,
        }


# --- arguments -------------------------------------------------------------------------------------------------------


def check(arguments: SampleArguments) -> SampleRequest:
    """Check the arguments before anything is drawn, and create the folders of the files.

    Raises:
        ValueError: one line that names what is wrong and the remedy.
    """
    generator = find_artifact(arguments.generator, arguments.store, "generator")
    file = load_config(generator.folder, GeneratorFile)
    arguments.config.fit(file.generator)
    classes = chosen_classes(arguments.classes, file.codes.class_names or (), str(generator))
    settings = Settings()
    device, gpus = choose_device(arguments.compute, gpus=arguments.gpus_per_worker, settings=settings)
    arguments = arguments._replace(
        config=arguments.config.on(device),
        compute=arguments.compute.model_copy(update={"device": device}),
        gpus_per_worker=gpus,
    )
    request = SampleRequest(arguments, generator, file.codes, classes, WorkerOptions())
    width = _width(len(request.shards)) if arguments.workers is None else arguments.workers
    request = request._replace(options=WorkerOptions(workers=width, gpus_per_worker=gpus))
    check_names(arguments.outputs)
    if any(arguments.outputs) or arguments.choice != Choice():
        decoding_models(generator, arguments.choice)
    if find(generator.store, request.plan) is None:
        check_reachable(settings.ray_address)
        generator.store.check()
        warn_of_slow({"--precision": arguments.config.arithmetic}, settings, device)
    new_files(_files(request))
    return request


def _width(shards: int) -> int:
    """Return the default number of workers: as in a run, but no Ray if there is only one shard."""
    width = min(usual_workers(None), shards)
    return width if width > 1 else 0


def _files(request: SampleRequest) -> list[Path]:
    """Return all files that must not exist yet and whose folders have to be created."""
    folder, sheet, npz = request.arguments.outputs
    pictures = list(request.pictures.values())
    if folder is not None and is_unfinished(folder, request.settings):
        pictures = [file for file in pictures if not file.exists()]
    return pictures + [file for file in (sheet, npz) if file is not None]


# --- codes -----------------------------------------------------------------------------------------------------------


def sample(request: SampleRequest, progress: Callable[[str], Progress]) -> SampleResult:
    """Draw the samples unless they are cached, then write the images that were asked for.

    Raises:
        ValueError: not all samples were drawn, or the samples are damaged.
    """
    asked, store = request.arguments, request.generator.store
    samples, state = find_or_publish(store, request.plan, lambda out: _draw(request, out, progress("sample")))
    if any(asked.outputs):
        _write_images(request, samples, progress("decode"))
    names = request.info.class_names or ()
    classes = tuple(range(len(names))) if request.classes is None else request.classes
    count = samples.manifest.counts["samples"]
    return SampleResult(
        samples.ref, state, request.generator.ref, classes, asked.config.per_class, count, asked.outputs
    )


def _draw(request: SampleRequest, out: Store, progress: Progress) -> Result:
    asked = request.arguments
    job = SampleJob(
        generator=request.generator.folder,
        out=out,
        config=asked.config,
        seed=asked.seed,
        identity=request.generator.ref.digest,
        classes=request.classes,
        device=asked.compute.device,
        numerics=asked.compute.numerics,
    )
    with session(Settings().ray_address, request.options.workers):
        if asked.anew:
            give_up_others(out, asked.compute, request.options)
        return samples_result(generate(job, options=request.options, progress=progress))


# --- images ----------------------------------------------------------------------------------------------------------


def _write_images(request: SampleRequest, samples: Artifact, progress: Progress) -> None:
    """Decode each sample that is needed once, into all files that were asked for."""
    folder, sheet, npz = request.arguments.outputs
    count = sum(map(len, request.shards))
    shown = sheet_rows(request) if sheet is not None else {}
    needed = None
    if not npz:
        missing = {sample_id for sample_id, file in request.pictures.items() if not file.exists()}
        needed = missing.union(*shown.values())
    with (
        marked_unfinished(folder, request.settings),
        image_writer(request.arguments.outputs, count=count, size=request.info.image_size, rows=shown) as take,
    ):
        done, total = 0, count if needed is None else len(needed)
        for part in decoded(request, samples, needed):
            take(part)
            done += len(part.sample_ids)
            progress(done, total, {})
        if done != total:
            raise ValueError(f"{samples} has {done} of {total} samples: `sftok verify` it")


def decoded(request: SampleRequest, samples: Artifact, needed: set[str] | None = None) -> Iterator[ImageBatch]:
    """Decode samples in the order of shards, and of ids within a shard; yield at most a micro-batch at a time.

    Args:
        request: whose generator names the tokenizer.
        samples: the codes.
        needed: ids of the samples that are decoded; None for all.
    """
    asked, size = request.arguments, request.arguments.config.micro_batch
    decoding = DecodingConfig(num_steps=asked.decode_steps)
    decoder = request.models.decoder(decoding_device(asked.compute.device), micro_batch=size, seed=asked.seed)
    missing = None if needed is None else set(needed)
    for entry in samples.shards():
        if missing is not None and not missing:
            return
        _, rows = read_codes(samples.store, [samples.key(entry)])
        chosen = [row for row, name in enumerate(rows.image_id) if missing is None or name in missing]
        for at in range(0, len(chosen), size):
            part = chosen[at : at + size]
            ids = [rows.image_id[row] for row in part]
            yield ImageBatch(ids, decoder(torch.from_numpy(rows.codes[part].astype(np.int64)), ids, decoding).images)
        if missing is not None:
            missing.difference_update(rows.image_id)


def sheet_rows(request: SampleRequest) -> dict[str, list[str]]:
    """Return the ids of the first samples of evenly spaced classes, by their title on the contact sheet."""
    names, first = request.info.class_names or (), min(request.arguments.config.per_class, SHEET_SAMPLES)
    classes: Sequence[int] = request.classes or range(max(len(names), 1))
    at = np.linspace(0, len(classes) - 1, min(len(classes), SHEET_CLASSES)).round().astype(int)
    titles = [_title(classes[i], names) for i in at.tolist()]
    rows = [[SampleSpec(classes[i], number).sample_id for number in range(first)] for i in at.tolist()]
    return dict(zip(titles, rows, strict=True))


def _title(class_id: int, names: Sequence[str]) -> str:
    """Return the class's id and name; the id alone if both are the same, as in digits."""
    if not names:
        return name_of(-1, names)
    return names[class_id] if names[class_id] == str(class_id) else f"{class_id}  {names[class_id]}"
