"""The stages between images and codes: prepare and encode."""

from typing import TYPE_CHECKING

from pydantic import JsonValue

from flows.pipeline.image_counts import ImageCounts, check_counts, fewest_held_out
from flows.pipeline.space import Sizes, refuse_full_disk
from flows.runs.progress import display
from flows.stage import Result, Stage, StageJob, Work, computed, give_up_others, shards, worker_facts
from infra.artifacts.made_on import claim_shards, decisive, describe_kind
from infra.artifacts.manifest import Manifest
from infra.errors import TransientError

if TYPE_CHECKING:
    from sftok.sources.sources import Source


def _prepare_what(job: StageJob) -> dict[str, JsonValue]:
    from sftok.sources.sources import list_source
    from sftok.sources.summary import summarize

    source = list_source(job.source, job.recipe.data)
    digest = source.digest
    for line in summarize(source, job.recipe.data).lines():
        display().line(line)
    _check_expected(job, source)
    if job.listing is not None:
        job.listing.put(digest, source)
    return {"data": job.recipe.data.identity(), "listing": digest}


def _check_expected(job: StageJob, source: "Source") -> None:
    """Refuse a source whose listing shows that it is not enough for the run."""
    from sftok.prepare.expected import expected_split

    expected = expected_split(source, job.recipe.data)
    if expected is None:
        return
    if expected.lone_class is not None and not source.is_declared:
        raise ValueError(
            f"source {source.uri}: a hash holds out all images of class {expected.lone_class!r}: add images to it, or "
            "give the source a val split of its own"
        )
    counts = ImageCounts(expected.train, expected.val, expected.classes)
    fraction = expected.fraction_for(fewest_held_out(job.recipe, job.stages))
    if fraction is not None:
        counts = counts._replace(remedy=f"give --set data.val_fraction={fraction:g}")
    check_counts(job.recipe, counts, job.stages)


def _accept_images(job: StageJob, manifest: Manifest) -> None:
    from sftok.prepare.prepare import check_reject_rate

    if job.listing is not None:
        job.listing.drop()
    check_reject_rate(manifest.counts, job.recipe.data, f"images/{manifest.digest}")
    display().line(_counted(manifest))
    counts = manifest.counts
    check_counts(job.recipe, ImageCounts(counts["train"], counts["val"], counts["classes"]), job.stages)
    if job.images is not None and manifest.content_digest != job.images:
        raise ValueError(
            f"source {job.source}: its images, their classes or splits are not those of the run that is repeated "
            f"(content {manifest.content_digest}, then {job.images}): restore them, or use sftok run for the new ones"
        )


def _counted(manifest: Manifest) -> str:
    """Say what became of a source's entries."""
    counts = {"left_out": 0, **manifest.counts}
    text = f"images/{manifest.digest}: {counts['train']:,} to train on, {counts['val']:,} held out"
    text += f", {counts['classes']:,} classes" if counts["classes"] else ", no classes"
    if counts["rejected"]:
        rejected = counts["rejected"] - counts["left_out"]
        text += f"; rejected {rejected:,}, left out {counts['left_out']:,}: see its rejects.parquet"
    return text


def _prepare(work: Work) -> Result:
    from sftok.prepare.prepare import prepare

    source = _listed(work)
    _check_space(source, work)
    made = prepare(
        source,
        work.recipe.data,
        out=work.out,
        options=work.job.workers,
        progress=work.progress,
    )
    return Result(made.files, made.counts, {}, made.content_digest)


def _check_space(source: "Source", work: Work) -> None:
    """Refuse a store on a disk that has no room for the run; images that are resized are not estimated."""
    from sftok.sources.summary import summarize

    recipe, job = work.recipe, work.job
    is_resized = bool(recipe.data.store_size)
    needed = 0 if is_resized else source.num_bytes * (2 if source.unpack is not None and source.unpack.lays_open else 1)
    needed += Sizes.of(recipe, summarize(source, recipe.data).images).total(job.stages - {"prepare"})
    remedy = "" if is_resized else ", or keep images resized by --set data.store_size"
    refuse_full_disk(job.store, needed, remedy)


def _listed(work: Work) -> "Source":
    """Return the source as it was listed for the plan, or list it again if the listing was not passed on."""
    from sftok.sources.sources import list_source

    digest = str(work.plan.config["listing"])
    if work.job.listing is not None and (held := work.job.listing.take(digest)) is not None:
        return held
    source = list_source(work.job.source, work.recipe.data)
    if source.digest != digest:
        raise TransientError(f"source {work.job.source} changed while it was listed; it is listed again")
    return source


def _encode_what(job: StageJob) -> dict[str, JsonValue]:
    from sftok.images.preprocess import PREPROCESSINGS

    return {
        "encode": job.recipe.encode.identity(),
        "image_size": job.recipe.data.image_size,
        "shards": shards(job),
        "preprocessing": PREPROCESSINGS[job.recipe.encode.decoder],
        "augment": job.recipe.augment.as_json(),
        "threads": job.workers.threads_per_worker,
        **computed(job.recipe.compute),
    }


def _encode(work: Work) -> Result:
    from infra.artifacts.reuse import Reuse
    from infra.codes.contract import CodesInfo
    from sftok.coding.encode import EncodeJob, encode
    from sftok.images.dataset import ImageSet

    config, tokenizer = work.recipe.encode, work.recipe.tokenizer
    images = work.input("images")
    paths = [shard.path for shard in images.shards()]
    info = CodesInfo(
        tokenizer=work.ref("tokenizer").digest,
        codebook_size=tokenizer.codebook_size,
        num_tokens=tokenizer.num_latent_tokens,
        image_size=work.recipe.data.image_size,
        assignment=config.assignment,
        precision=config.precision,
        class_names=ImageSet.of(images.folder, paths).class_names,
    )
    if work.job.anew:
        give_up_others(work.out, work.recipe.compute, work.job.workers)
    facts = worker_facts(work.recipe.compute, work.job.workers)
    claim_shards(work.out, facts)  # before shards of this kind are found among earlier versions
    without_images = work.plan.model_copy(update={"inputs": {"tokenizer": work.ref("tokenizer")}})
    job = EncodeJob(
        images=images.folder,
        tokenizer=work.input("tokenizer").folder,
        out=work.out,
        info=info,
        variants={"train": config.variants, "val": config.val_variants},
        augment=work.recipe.augment,
        micro_batch=config.micro_batch,
        reuse=Reuse(work.job.store, work.plan.prefix, f"{without_images.digest} on {describe_kind(decisive(facts))}"),
        ten_crop_resize=config.ten_crop_resize,
        decoder=config.decoder,
        device=work.job.device,
        compile=bool(config.compile),
        numerics=work.recipe.compute.numerics,
    )
    made = encode(job, images.manifest, options=work.job.workers, progress=work.progress)
    return Result(made.files, made.counts, {}, pages=made.pages)


PREPARE = Stage("prepare", "images", 2, _prepare_what, _prepare, accept=_accept_images)
ENCODE = Stage("encode", "codes", 2, _encode_what, _encode, needs={"images": "prepare", "tokenizer": "fine_tune"})
