"""Stage that evaluates an arm of an ablation: the aligned tokenizer on all held-out images, as arm.json."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import JsonValue

from flows.stage import Result, Stage, StageJob, Work, computed, seeded, shards
from infra.artifacts.shards import put

if TYPE_CHECKING:
    from sftok.images.dataset import ImageRows

ARM = "arm.json"


def _arm_what(job: StageJob) -> dict[str, JsonValue]:
    from sftok.images.preprocess import PREPROCESSING

    recipe = job.recipe
    return {
        "steps": list(recipe.evaluate.steps),
        "decoding": recipe.decoding.identity(),
        "feature_seed": recipe.evaluate.feature_seed,
        "image_size": recipe.data.image_size,
        "shards": shards(job),  # sums are taken shard after shard
        "micro_batch": recipe.encode.micro_batch,
        "preprocessing": PREPROCESSING,
        **seeded(job),
        **computed(recipe.compute),
    }


def _arm(work: Work) -> Result:
    import torch

    from sftok.evaluation.alignment import AlignmentMeter
    from sftok.metrics.random_features import RandomFeatures
    from sftok.weights.artifacts import load_teacher, load_tokenizer

    recipe, device = work.recipe, work.job.device
    torch.set_num_threads(recipe.threads)
    meter = AlignmentMeter(
        load_tokenizer(work.input("tokenizer").folder).to(device),
        load_teacher(work.input("teacher").folder).to(device),
        steps=recipe.evaluate.steps,
        decoding=recipe.decoding,
        micro_batch=recipe.encode.micro_batch,
        features=RandomFeatures(recipe.evaluate.feature_seed, recipe.data.image_size),
        seed=recipe.seed,
    )
    total, done = sum(work.input("images").rows("val").values()), 0
    for rows in _held_out(work):
        meter.add(rows.images, rows.image_ids)
        done += len(rows.image_ids)
        work.progress(done, total, {})
    if done != total:
        raise ValueError(
            f"{work.ref('images')}: {done} held-out images, its manifest says {total}: delete its folder and prepare"
        )
    figures = meter.metrics()
    metrics = {f"psnr@{step.num_steps}": step.psnr for step in figures.by_steps}
    metrics |= {f"code_agreement@{step.num_steps}": step.code_agreement for step in figures.by_steps}
    text = figures.model_dump_json(indent=1)
    return Result([put(work.out, ARM, text.encode())], {"images": figures.num_images}, metrics)


def _held_out(work: Work) -> Iterator["ImageRows"]:
    """Yield the held-out images shard after shard, at most a micro-batch at a time.

    Raises:
        ValueError: an image does not decode.
    """
    from sftok.images.chunks import decoded_chunks

    store, size = work.job.store, work.recipe.data.image_size
    for key in work.input("images").keys("val"):
        for chunk in decoded_chunks(store, key, size, work.recipe.encode.micro_batch):
            if chunk.failed:
                raise ValueError(f"{store.uri}/{key}: an image does not decode; delete its folder and prepare")
            yield chunk.rows


ABLATION_ARM = Stage(
    "ablation_arm",
    "ablation_arm",
    1,
    _arm_what,
    _arm,
    is_measured=True,
    needs={"images": "prepare", "teacher": "teacher", "tokenizer": "align"},
)
