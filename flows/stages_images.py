"""The stages between images and codes: prepare and encode."""

from pydantic import JsonValue

from flows.stage import Job, Result, Stage, Work, shards, what_of
from infra.artifacts import Manifest, manifest_of
from infra.errors import TransientError


def _prepare_what(job: Job) -> dict[str, JsonValue]:
    from sftok.sources import list_source

    return {"data": what_of(job.recipe.data), "listing": list_source(job.source, job.recipe.data).digest}


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


def _encode_what(job: Job) -> dict[str, JsonValue]:
    from sftok.preprocess import PREPROCESSING

    return {
        "encode": job.recipe.encode.as_json(),
        "image_size": job.recipe.data.image_size,
        "shards": shards(job),
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


PREPARE = Stage("prepare", "images", 1, _prepare_what, _prepare, accept=_accept_images)
ENCODE = Stage("encode", "codes", 2, _encode_what, _encode)
