"""The stages of the generators: train_generator, train_second_generator and sample."""

from collections.abc import Mapping
from dataclasses import replace

from pydantic import JsonValue

from flows.stage import Result, Stage, StageJob, Work, computed, give_up_others, seeded, training_run
from infra.artifacts.manifest import ArtifactRef
from infra.artifacts.shards import FileEntry
from infra.codes.contract import CodesInfo


def _train_generator_what(job: StageJob) -> dict[str, JsonValue]:
    recipe = job.recipe
    return {
        "generator": recipe.generator.as_json(),
        **recipe.train_generator.identity(),
        **seeded(job),
        **computed(recipe.compute),
    }


def _train_generator(work: Work) -> Result:
    from generator.data import CodeData
    from generator.train import train_generator
    from infra.codes.shared import share_codes

    recipe, run = work.recipe, training_run(work)
    codes = work.input("codes")
    info, train = share_codes(codes.store, codes.keys("train"), work.ranks, run.device)
    val_info, val = share_codes(codes.store, codes.keys("val"), work.ranks, run.device)
    if not recipe.train_generator.any_tokenizer:
        check_tokenizer(codes.inputs.get("tokenizer"), work.ref("codes"), {"train": info, "val": val_info})
    model, training = recipe.generator, recipe.train_generator
    return Result(*train_generator(CodeData.of(train), CodeData.of(val), info, model, training, run=run))


def _second(job: StageJob) -> StageJob:
    """Return the job whose generator is the sweep's second one: a recipe of its own makes the same artifact."""
    assert job.recipe.second is not None
    return job._replace(recipe=job.recipe.second)


def _train_second_generator_what(job: StageJob) -> dict[str, JsonValue]:
    return _train_generator_what(_second(job))


def _train_second_generator(work: Work) -> Result:
    return _train_generator(replace(work, job=_second(work.job)))


def check_tokenizer(tokenizer: ArtifactRef | None, codes: ArtifactRef, splits: Mapping[str, CodesInfo]) -> None:
    """Refuse codes that are of another tokenizer than their manifest says, or of two.

    Raises:
        ValueError: naming the split and both tokenizers.
    """
    said = next(iter(splits.values())).tokenizer if tokenizer is None else tokenizer.digest
    for split, info in splits.items():
        if info.tokenizer != said:
            raise ValueError(
                f"{codes}: its {split} shards hold codes of tokenizer/{info.tokenizer}, its manifest says "
                f"tokenizer/{said}: codes of two tokenizers do not mix; delete that folder and encode again, or set "
                "train_generator.any_tokenizer=true if they mean the same"
            )


def _sample_what(job: StageJob) -> dict[str, JsonValue]:
    threads = job.workers.threads_per_worker
    return {
        "sample": job.recipe.sample.as_json(),
        "seed": job.recipe.seed,
        "threads": threads,
        **computed(job.recipe.compute),
    }


def _sample(work: Work) -> Result:
    from generator.samples import SampleJob, generate

    if work.job.anew:
        give_up_others(work.out, work.recipe.compute, work.job.workers)
    job = SampleJob(
        generator=work.input("generator").folder,
        out=work.out,
        config=work.recipe.sample,
        seed=work.recipe.seed,
        identity=work.ref("generator").digest,
        device=work.job.device,
        numerics=work.recipe.compute.numerics,
    )
    return samples_result(generate(job, options=work.job.workers, progress=work.progress))


def samples_result(files: list[FileEntry]) -> Result:
    """Return what there is to say about shards of samples."""
    return Result(files, {"shards": len(files), "samples": sum(file.rows or 0 for file in files)}, {})


TRAIN_GENERATOR = Stage(
    "train_generator",
    "generator",
    2,
    _train_generator_what,
    _train_generator,
    is_trained=True,
    needs={"codes": "encode"},
)
TRAIN_SECOND_GENERATOR = TRAIN_GENERATOR._replace(
    name="train_second_generator", what=_train_second_generator_what, call=_train_second_generator
)
SAMPLE = Stage("sample", "samples", 2, _sample_what, _sample, needs={"generator": "train_generator"})
