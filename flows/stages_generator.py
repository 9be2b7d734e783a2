"""The stages of the generator: train_generator and sample."""

from pydantic import JsonValue

from flows.stage import Job, Result, Stage, Work, seeded, training_run, what_of


def _train_generator_what(job: Job) -> dict[str, JsonValue]:
    return {"generator": job.recipe.generator.as_json(), **what_of(job.recipe.train_generator), **seeded(job)}


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
        run=training_run(work),
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


TRAIN_GENERATOR = Stage("train_generator", "generator", 1, _train_generator_what, _train_generator, is_trained=True)
SAMPLE = Stage("sample", "samples", 2, _sample_what, _sample)
