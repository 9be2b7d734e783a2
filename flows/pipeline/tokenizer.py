"""The stages that train the tokenizer: teacher, warm_up, align, fine_tune."""

from typing import TYPE_CHECKING

from pydantic import JsonValue

from flows.recipes.schema import Recipe
from flows.stage import Result, Stage, StageJob, Work, computed, seeded, shards, training_run
from infra.artifacts.pretrained import read_pretrained
from infra.config import Config
from sftok.config import AlignmentStageConfig, TokenizerConfig

if TYPE_CHECKING:
    from sftok.model.tokenizer import SFTok
    from sftok.training.common import TrainingImages, Weights


def _training_what(job: StageJob, config: Config) -> dict[str, JsonValue]:
    from sftok.images.preprocess import PREPROCESSING

    return {
        **config.identity(),
        "image_size": job.recipe.data.image_size,
        "shards": shards(job),
        "preprocessing": PREPROCESSING,
        "augment": job.recipe.augment.as_json(),
        **seeded(job),
        **computed(job.recipe.compute),
    }


def _training_images(work: Work) -> "TrainingImages":
    from sftok.training.common import TrainingImages

    images = work.input("images")
    rows = {shard.path: shard.rows or 0 for shard in images.shards()}
    return TrainingImages.open(images.folder, rows, work.recipe.data.image_size, work.recipe.augment)


def _weights(work: Work) -> "Weights":
    return lambda config, what: read_pretrained(config, work.job.store, what)


def _teacher_what(job: StageJob) -> dict[str, JsonValue]:
    config = job.recipe.teacher
    if config.origin == "imported":
        model: dict[str, JsonValue] = {"teacher": config.model.as_json()}
        return {"imported": config.pretrained.sha256, "layout": "teacher", "model": model}  # as `sftok import-weights`
    return _training_what(job, config)


def _teacher(work: Work) -> Result:
    from sftok.training.teacher import train_teacher

    config = work.recipe.teacher
    if config.origin == "imported":
        from sftok.weights.import_teacher import import_teacher

        data = read_pretrained(config.pretrained, work.job.store, "teacher.pretrained")
        return Result(*import_teacher(data, config.model, work.out))
    made = train_teacher(_training_images(work), config, run=training_run(work), weights=_weights(work))
    return Result(*made)


def _warm_up_what(job: StageJob) -> dict[str, JsonValue]:
    tokenizer = job.recipe.tokenizer.as_json()
    return {"stage": "warm_up", "tokenizer": tokenizer, **_training_what(job, job.recipe.warm_up)}


def _align_what(job: StageJob) -> dict[str, JsonValue]:
    start = {"tokenizer": job.recipe.tokenizer.as_json()} if job.recipe.align.from_scratch else {}
    return {"stage": "align", **start, **_training_what(job, job.recipe.align)}


def _fine_tune_what(job: StageJob) -> dict[str, JsonValue]:
    return {"stage": "fine_tune", **_training_what(job, job.recipe.fine_tune)}


def _warm_up(work: Work) -> Result:
    return _alignment(work, work.recipe.warm_up, work.recipe.tokenizer)


def _align(work: Work) -> Result:
    from sftok.weights.artifacts import load_tokenizer

    if work.recipe.align.from_scratch:
        return _alignment(work, work.recipe.align, work.recipe.tokenizer)
    return _alignment(work, work.recipe.align, load_tokenizer(work.input("tokenizer").folder))


def _alignment(work: Work, config: AlignmentStageConfig, start: "SFTok | TokenizerConfig") -> Result:
    from sftok.training.alignment import train_alignment
    from sftok.weights.artifacts import load_teacher

    made = train_alignment(
        _training_images(work),
        config,
        teacher=load_teacher(work.input("teacher").folder),
        start=start,
        image_size=work.recipe.data.image_size,
        run=training_run(work),
    )
    return Result(*made)


def _fine_tune(work: Work) -> Result:
    from sftok.training.fine_tune import train_fine_tune
    from sftok.weights.artifacts import load_teacher, load_tokenizer

    made = train_fine_tune(
        _training_images(work),
        work.recipe.fine_tune,
        teacher=load_teacher(work.input("teacher").folder),
        start=load_tokenizer(work.input("tokenizer").folder),
        run=training_run(work),
        weights=_weights(work),
    )
    return Result(*made)


def _imported_without_images(recipe: Recipe) -> tuple[str, ...]:
    return ("images",) if recipe.teacher.origin == "imported" else ()


def _begun_from_scratch(recipe: Recipe) -> tuple[str, ...]:
    return ("tokenizer",) if recipe.align.from_scratch else ()


_BOTH = {"images": "prepare", "teacher": "teacher"}

TEACHER = Stage(
    "teacher",
    "teacher",
    1,
    _teacher_what,
    _teacher,
    is_trained=True,
    needs={"images": "prepare"},
    unneeded=_imported_without_images,
)
WARM_UP = Stage("warm_up", "tokenizer", 1, _warm_up_what, _warm_up, is_trained=True, needs=_BOTH)
ALIGN = Stage(
    "align",
    "tokenizer",
    1,
    _align_what,
    _align,
    is_trained=True,
    needs={**_BOTH, "tokenizer": "warm_up"},
    unneeded=_begun_from_scratch,
)
FINE_TUNE = Stage(
    "fine_tune",
    "tokenizer",
    1,
    _fine_tune_what,
    _fine_tune,
    is_trained=True,
    needs={**_BOTH, "tokenizer": "align"},
)
