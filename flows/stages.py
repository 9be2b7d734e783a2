"""What each stage is: the config and inputs that identify its artifact, and the one library call that makes it.

The only place that knows the libraries' argument lists. Heavy imports happen inside the calls, so that the command line
starts fast.
"""

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from pydantic import JsonValue

from flows.recipes import Recipe
from infra.artifacts import ArtifactRef, FileEntry, Manifest, Plan, folder_of, key_of, manifest_of
from infra.config import Config
from infra.errors import TransientError
from infra.pretrained import read_pretrained
from infra.progress import Progress
from infra.ranks import ALONE, Ranks, run_ranks
from infra.store import Store
from infra.workers import WorkerOptions
from sftok.config import AlignmentStageConfig, TokenizerConfig

if TYPE_CHECKING:
    from infra.training import Run
    from sftok.model import SFTok
    from sftok.train import TrainingImages, Weights

Refs = Mapping[str, ArtifactRef]

# How a training runs and where weights come from, not what is computed: kept out of the digest.
HOW = frozenset(
    {
        "max_reject_rate",
        "class_names_file",
        "checkpoint_every",
        "keep_checkpoints",
        "log_every",
        "activation_checkpointing",
        "uri",
    }
)


class Job(NamedTuple):
    """One run of a recipe: where it reads and writes, and how wide it runs."""

    recipe: Recipe
    store: Store
    source: str
    workers: WorkerOptions
    run: str = ""
    ranks: int = 1


class Result(NamedTuple):
    """What a stage's library call leaves behind in its folder."""

    files: list[FileEntry]
    counts: dict[str, int]
    metrics: dict[str, float]
    content_digest: str | None = None


class Work(NamedTuple):
    """Everything one stage's call may use."""

    job: Job
    plan: Plan
    out: Store
    progress: Progress
    ranks: Ranks = ALONE

    @property
    def recipe(self) -> Recipe:
        """The run's recipe."""
        return self.job.recipe

    def folder(self, name: str) -> Store:
        """The folder of the input called `name`."""
        ref = self.plan.inputs[name]
        return folder_of(self.job.store, ref.kind, ref.digest)

    def keys(self, name: str, start: str = "") -> list[str]:
        """Keys of the input's files whose names begin with `start`: where in the store each of them lies."""
        manifest = manifest_of(self.job.store, self.plan.inputs[name])
        return [key_of(manifest, file) for file in manifest.files if file.path.startswith(start)]

    def ref(self, name: str) -> ArtifactRef:
        """The input called `name`."""
        return self.plan.inputs[name]


class Stage(NamedTuple):
    """A named step of the pipeline."""

    name: str
    kind: str
    version: int  # raised by hand when the same config gives another artifact
    what: Callable[[Job], dict[str, JsonValue]]
    call: Callable[[Work], Result]
    is_trained: bool = False  # by as many ranks as the job has
    accept: Callable[[Job, Manifest], None] | None = None  # refuses what was made under other conditions


def plan(stage: Stage, job: Job, inputs: Refs) -> Plan:
    """Identify the artifact that `stage` makes of `inputs`."""
    return Plan(kind=stage.kind, version=stage.version, config=stage.what(job), inputs=dict(inputs))


def run(stage: Stage, work: Work) -> Result:
    """Make the artifact's files in `work.out`; nothing is published yet."""
    if not stage.is_trained or work.job.ranks == 1:
        return stage.call(work)
    this = functools.partial(_in_rank, stage.name, work.job, work.plan, work.out)
    return run_ranks(this, work.job.ranks, progress=work.progress)


def _in_rank(name: str, job: Job, plan: Plan, out: Store, ranks: Ranks, progress: Progress) -> Result:
    return STAGES[name].call(Work(job, plan, out, progress, ranks))


def _what(config: Config) -> dict[str, JsonValue]:
    """A stage's config without the settings that say only how it runs."""
    what = _without_how(config.as_json())
    assert isinstance(what, dict)
    return what


def _without_how(value: JsonValue) -> JsonValue:
    if isinstance(value, dict):
        return {key: _without_how(inner) for key, inner in value.items() if key not in HOW}
    return value


def _shards(job: Job) -> JsonValue:
    """How the images are divided: the same images make other files, and are streamed in another order."""
    return [job.recipe.data.num_shards, job.recipe.data.num_val_shards]


def _seeded(job: Job) -> dict[str, JsonValue]:
    return {"seed": job.recipe.seed, "threads": job.recipe.threads}


def _training_run(work: Work) -> "Run":
    from infra.training import Run, default_device

    recipe = work.recipe
    return Run(work.out, recipe.seed, recipe.threads, default_device(), work.progress, work.ranks)


# --- prepare ---------------------------------------------------------------------------------------------------------


def _prepare_what(job: Job) -> dict[str, JsonValue]:
    from sftok.sources import list_source

    return {"data": _what(job.recipe.data), "listing": list_source(job.source, job.recipe.data).digest}


def _accept_images(job: Job, manifest: Manifest) -> None:
    from sftok.prepare import check_reject_rate

    check_reject_rate(manifest.counts, job.recipe.data, f"images/{manifest.digest}")


def _prepare(work: Work) -> Result:
    from sftok.prepare import prepare
    from sftok.sources import list_source

    source = list_source(work.job.source, work.recipe.data)
    if source.digest != work.plan.config["listing"]:
        raise TransientError(f"source {work.job.source} changed while it was listed; it is listed again")
    made = prepare(
        source,
        work.recipe.data,
        out=work.out,
        options=work.job.workers,
        progress=work.progress,
    )
    return Result(made.files, made.counts, {}, made.content_digest)


# --- training the tokenizer ------------------------------------------------------------------------------------------


def _training_what(job: Job, config: Config) -> dict[str, JsonValue]:
    from sftok.preprocess import PREPROCESSING

    return {
        **_what(config),
        "image_size": job.recipe.data.image_size,
        "shards": _shards(job),
        "preprocessing": PREPROCESSING,
        "augment": job.recipe.augment.as_json(),
        **_seeded(job),
    }


def _training_images(work: Work) -> "TrainingImages":
    from sftok.train import TrainingImages

    rows = {
        f.path: f.rows or 0
        for f in manifest_of(work.job.store, work.ref("images")).files
        if f.path != "rejects.parquet"
    }
    return TrainingImages.open(work.folder("images"), rows, work.recipe.data.image_size, work.recipe.augment)


def _weights(work: Work) -> "Weights":
    return lambda config, what: read_pretrained(config, work.job.store, what)


def _teacher_what(job: Job) -> dict[str, JsonValue]:
    config = job.recipe.teacher
    if config.origin == "imported":
        model: dict[str, JsonValue] = {"teacher": config.model.as_json()}
        return {"imported": config.pretrained.sha256, "layout": "teacher", "model": model}  # as `sftok import-weights`
    return _training_what(job, config)


def _teacher(work: Work) -> Result:
    from sftok.train_teacher import train_teacher

    config = work.recipe.teacher
    if config.origin == "imported":
        from sftok.imported import import_teacher

        data = read_pretrained(config.pretrained, work.job.store, "teacher.pretrained")
        return Result(*import_teacher(data, config.model, work.out))
    made = train_teacher(_training_images(work), config, run=_training_run(work), weights=_weights(work))
    return Result(*made)


def _warm_up_what(job: Job) -> dict[str, JsonValue]:
    tokenizer = job.recipe.tokenizer.as_json()
    return {"stage": "warm_up", "tokenizer": tokenizer, **_training_what(job, job.recipe.warm_up)}


def _align_what(job: Job) -> dict[str, JsonValue]:
    start = {"tokenizer": job.recipe.tokenizer.as_json()} if job.recipe.align.from_scratch else {}
    return {"stage": "align", **start, **_training_what(job, job.recipe.align)}


def _fine_tune_what(job: Job) -> dict[str, JsonValue]:
    return {"stage": "fine_tune", **_training_what(job, job.recipe.fine_tune)}


def _warm_up(work: Work) -> Result:
    return _alignment(work, work.recipe.warm_up, work.recipe.tokenizer)


def _align(work: Work) -> Result:
    from sftok.artifacts import load_tokenizer

    if work.recipe.align.from_scratch:
        return _alignment(work, work.recipe.align, work.recipe.tokenizer)
    return _alignment(work, work.recipe.align, load_tokenizer(work.folder("tokenizer")))


def _alignment(work: Work, config: AlignmentStageConfig, start: "SFTok | TokenizerConfig") -> Result:
    from sftok.artifacts import load_teacher
    from sftok.train_alignment import train_alignment

    made = train_alignment(
        _training_images(work),
        config,
        teacher=load_teacher(work.folder("teacher")),
        start=start,
        image_size=work.recipe.data.image_size,
        run=_training_run(work),
    )
    return Result(*made)


def _fine_tune(work: Work) -> Result:
    from sftok.artifacts import load_teacher, load_tokenizer
    from sftok.train_fine_tune import train_fine_tune

    made = train_fine_tune(
        _training_images(work),
        work.recipe.fine_tune,
        teacher=load_teacher(work.folder("teacher")),
        start=load_tokenizer(work.folder("tokenizer")),
        run=_training_run(work),
        weights=_weights(work),
    )
    return Result(*made)


# --- codes and generator ---------------------------------------------------------------------------------------------


def _encode_what(job: Job) -> dict[str, JsonValue]:
    from sftok.preprocess import PREPROCESSING

    return {
        "encode": job.recipe.encode.as_json(),
        "image_size": job.recipe.data.image_size,
        "shards": _shards(job),
        "preprocessing": PREPROCESSING,
        "augment": job.recipe.augment.as_json(),
        "threads": job.workers.threads_per_worker,
    }


def _encode(work: Work) -> Result:
    from infra.codes import CodesInfo
    from infra.reuse import Reuse
    from sftok.data import ImageSet
    from sftok.encode import EncodeJob, encode

    config, tokenizer = work.recipe.encode, work.recipe.tokenizer
    images = manifest_of(work.job.store, work.ref("images"))
    info = CodesInfo(
        tokenizer=work.ref("tokenizer").digest,
        codebook_size=tokenizer.codebook_size,
        num_tokens=tokenizer.num_latent_tokens,
        image_size=work.recipe.data.image_size,
        assignment=config.assignment,
        precision=config.precision,
        class_names=ImageSet.of(work.folder("images"), [file.path for file in images.files]).class_names,
    )
    without_images = work.plan.model_copy(update={"inputs": {"tokenizer": work.ref("tokenizer")}})
    job = EncodeJob(
        images=work.folder("images"),
        tokenizer=work.folder("tokenizer"),
        out=work.out,
        info=info,
        variants={"train": config.variants, "val": config.val_variants},
        augment=work.recipe.augment,
        micro_batch=config.micro_batch,
        reuse=Reuse(work.job.store, work.plan.prefix, without_images.digest),
    )
    made = encode(job, images, options=work.job.workers, progress=work.progress)
    return Result(made.files, made.counts, {})


def _train_generator_what(job: Job) -> dict[str, JsonValue]:
    return {"generator": job.recipe.generator.as_json(), **_what(job.recipe.train_generator), **_seeded(job)}


def _train_generator(work: Work) -> Result:
    from generator.data import CodeData
    from generator.train import train_generator
    from infra.codes import read_codes

    store, recipe = work.job.store, work.recipe
    info, train = read_codes(store, work.keys("codes", "train-"))
    _, val = read_codes(store, work.keys("codes", "val-"))
    made = train_generator(
        CodeData.of(train),
        CodeData.of(val),
        info,
        recipe.generator,
        recipe.train_generator,
        run=_training_run(work),
    )
    return Result(*made)


def _sample_what(job: Job) -> dict[str, JsonValue]:
    threads = job.workers.threads_per_worker
    return {"sample": job.recipe.sample.as_json(), "seed": job.recipe.seed, "threads": threads}


def _sample(work: Work) -> Result:
    from generator.generate import SampleJob, generate

    job = SampleJob(
        generator=work.folder("generator"),
        out=work.out,
        config=work.recipe.sample,
        seed=work.recipe.seed,
        identity=work.ref("generator").digest,
    )
    files = generate(job, options=work.job.workers, progress=work.progress)
    return Result(files, {"shards": len(files), "samples": sum(file.rows or 0 for file in files)}, {})


# --- evaluation and report -------------------------------------------------------------------------------------------


def _evaluate_what(job: Job) -> dict[str, JsonValue]:
    recipe = job.recipe
    return {
        "evaluate": recipe.evaluate.as_json(),
        "decoding": recipe.decoding.as_json(),
        "image_size": recipe.data.image_size,
        "micro_batch": recipe.encode.micro_batch,
        **_seeded(job),
    }


def _evaluate(work: Work) -> Result:
    from flows.evidence import measure

    return measure(work)


def _report_what(job: Job) -> dict[str, JsonValue]:
    return {"recipe": job.recipe.as_json()}


def _report(work: Work) -> Result:
    from flows.pages import write_pages

    return write_pages(work)


PREPARE = Stage("prepare", "images", 1, _prepare_what, _prepare, accept=_accept_images)
TEACHER = Stage("teacher", "teacher", 1, _teacher_what, _teacher, is_trained=True)
WARM_UP = Stage("warm_up", "tokenizer", 1, _warm_up_what, _warm_up, is_trained=True)
ALIGN = Stage("align", "tokenizer", 1, _align_what, _align, is_trained=True)
FINE_TUNE = Stage("fine_tune", "tokenizer", 1, _fine_tune_what, _fine_tune, is_trained=True)
ENCODE = Stage("encode", "codes", 2, _encode_what, _encode)
TRAIN_GENERATOR = Stage("train_generator", "generator", 1, _train_generator_what, _train_generator, is_trained=True)
SAMPLE = Stage("sample", "samples", 2, _sample_what, _sample)
EVALUATE = Stage("evaluate", "evaluation", 1, _evaluate_what, _evaluate)
REPORT = Stage("report", "report", 1, _report_what, _report)
STAGES = {
    stage.name: stage
    for stage in (PREPARE, TEACHER, WARM_UP, ALIGN, FINE_TUNE, ENCODE, TRAIN_GENERATOR, SAMPLE, EVALUATE, REPORT)
}
