"""Estimate the bytes that stages write, and refuse a store on a disk without room for them."""

import shutil
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from flows.recipes.schema import Recipe
from flows.stage import Stage, StageJob, plan_of, planned_ref
from flows.store.inventory import size_text
from infra.artifacts.manifest import ArtifactRef, find, folder_of, manifest_of, ref_of
from infra.store.store import Store

IMAGE_BYTES = 110_000  # of an encoded JPEG
CODE_BYTES = 1.67  # a code with its share of ids and labels: 106.8 bytes measured for 64 of 13 bits
MAX_CLASSES = 1000  # of images that have not been read
CHECKPOINT = 4  # weights, their average, and two moments of the optimizer
SIZE_SOURCE = (
    "110 KB an image (ImageNet's mean, assumed); codes as measured in docs/reference/codes.md; weights 4 bytes each"
)


class Sizes(NamedTuple):
    """Estimated bytes of stages; those that write next to nothing are left out."""

    artifacts: Mapping[str, int | None]
    """None where they depend on a number of images that is not known."""
    checkpoints: Mapping[str, int]
    """of a training while it lasts; they go when it ends."""

    @classmethod
    def of(cls, recipe: Recipe, images: int | None, classes: int = MAX_CLASSES) -> "Sizes":
        """Estimate the sizes of a recipe's stages."""
        weights, codes = _weight_bytes(recipe), CODE_BYTES * recipe.tokenizer.num_latent_tokens
        artifacts: dict[str, int | None] = {
            "prepare": None if images is None else images * IMAGE_BYTES,
            "encode": None if images is None else int(images * codes * len(recipe.encode.variants)),
            "sample": int(recipe.sample.per_class * classes * codes),
        }
        # The newest is written before the oldest goes.
        kept = {stage: training.keep_checkpoints + 1 for stage, training in recipe.trainings().items()}
        return cls(artifacts | weights, {stage: CHECKPOINT * weights[stage] * count for stage, count in kept.items()})

    def total(self, stages: Collection[str]) -> int:
        """Add up what stages write, with the checkpoints of the largest training among them."""
        checkpoints = max((self.checkpoints.get(stage, 0) for stage in stages), default=0)
        return sum(self.artifacts.get(stage) or 0 for stage in stages) + checkpoints


def check_space(job: StageJob, stages: Iterable[Stage], made: Mapping[str, ArtifactRef]) -> None:
    """Refuse a store on a disk that has no room for what these stages will write, given what is made already.

    Stages that are cached, and what a stopped run left of others, are not asked for again.

    Raises:
        ValueError: one line with what is free, what is needed and the remedy.
    """
    if not job.store.is_local:
        return
    known, written = dict(made), dict[str, int]()
    for stage in stages:
        plan = plan_of(stage, job, {need: known[of] for need, of in stage.inputs(job.recipe).items()})
        if (found := find(job.store, plan)) is not None:
            known[stage.name] = ref_of(job.store, found)
            continue
        known[stage.name] = planned_ref(job, plan)
        folder = folder_of(job.store, plan.kind, plan.digest).path
        written[stage.name] = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if not written:
        return  # before the models are made whose weights are counted, which loads torch's compiler: a second or two
    images, classes = None, MAX_CLASSES
    if "prepare" in made:
        counts = manifest_of(job.store, made["prepare"]).counts
        images, classes = counts["accepted"], max(counts["classes"], 1)
    sizes = Sizes.of(job.recipe, images, classes)
    there = sum(min(size, sizes.artifacts.get(stage) or 0) for stage, size in written.items())
    refuse_full_disk(job.store, sizes.total(written) - there)


def refuse_full_disk(store: Store, needed: int, remedy: str = "") -> None:
    """Refuse a store on a disk with fewer bytes free than a run needs."""
    if not store.is_local:
        return
    folder = store.path
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    if needed > free:
        raise ValueError(
            f"store {store.uri} has {size_text(free)} free, and the run needs {size_text(needed)}: free some, or "
            f"choose another --store{remedy}"
        )


def _weight_bytes(recipe: Recipe) -> dict[str, int]:
    """Count the bytes of each trained stage's weights, in float32."""
    import torch

    from generator.kinds import build_generator
    from sftok.model.teacher import Teacher
    from sftok.model.tokenizer import SFTok

    space = recipe.code_space(MAX_CLASSES)
    with torch.device("meta"):
        sftok = SFTok(recipe.tokenizer, recipe.teacher.model, recipe.data.image_size, pixels=True)
        made: dict[str, torch.nn.Module] = {
            "teacher": Teacher(recipe.teacher.model),
            "warm_up": sftok,
            "align": sftok,
            "fine_tune": sftok,
            "train_generator": build_generator(recipe.generator, space),
        }
        if recipe.second is not None:
            made["train_second_generator"] = build_generator(recipe.second.generator, space)
    return {name: 4 * sum(p.numel() for p in model.parameters()) for name, model in made.items()}
