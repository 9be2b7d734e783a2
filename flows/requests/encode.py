"""What `sftok encode` was asked for, checked before a server starts; the recipe that its stages run by."""

import os
import re
from collections.abc import Sequence
from typing import NamedTuple

from flows.recipes.files import load_recipe
from flows.recipes.schema import EncodeConfig, Recipe
from flows.requests.checks import check_decoder, check_servers, on_device
from flows.requests.precisions import warn_of_slow
from infra.artifacts.artifact import Artifact
from infra.artifacts.lineage import find_artifact
from infra.artifacts.manifest import ROOT, ArtifactRef
from infra.artifacts.weights import load_config
from infra.compute.workers import WorkerOptions
from infra.settings import Settings
from infra.store.store import Store
from sftok.config import AugmentConfig
from sftok.images.views import variant_name
from sftok.sources.sources import check_source
from sftok.weights.artifacts import TokenizerFile

SECTIONS = ("data", "augment", "compute")  # of a recipe, beside `encode`, that decide codes and are not the tokenizer's
_IMAGES = re.compile(r"images/[0-9a-f]{4,}")


class Dataset(NamedTuple):
    """Images and the tokenizer that they are encoded with."""

    recipe: Recipe
    store: Store
    tokenizer: ArtifactRef
    source: str
    images: ArtifactRef | None
    """prepared images; None: the source is prepared first."""


class EncodeRequest(NamedTuple):
    """An encoding that can begin."""

    dataset: Dataset
    options: WorkerOptions
    settings: Settings

    def settled(self, overrides: Sequence[str]) -> list[str]:
        """The overrides that the dataset was found by, with the device that was chosen since."""
        return [*overrides, f"compute.device={self.dataset.recipe.compute.device}"]


def check_encode_request(
    encode: EncodeConfig,
    *,
    tokenizer: str,
    data: str,
    store: str | None,
    overrides: Sequence[str],
    workers: int | None,
    gpus_per_worker: float | None,
) -> EncodeRequest:
    """Turn what the user asked for into a request, the store last: checking it writes to it.

    Raises:
        ValueError: one line that names what is wrong and the remedy.
    """
    settings = Settings()
    dataset = find_dataset(encode, tokenizer=tokenizer, data=data, store=store, overrides=overrides)
    recipe, gpus = on_device(dataset.recipe, gpus=gpus_per_worker, settings=settings)
    dataset = dataset._replace(recipe=recipe)
    check_decoder(recipe, settings)
    if dataset.images is None:
        check_source(data, dataset.recipe.data)
    check_servers(settings)
    dataset.store.check()
    warn_of_slow({"--precision": recipe.encode.precision}, settings, recipe.compute.device)
    width = min(2, os.cpu_count() or 1) if workers is None else workers
    return EncodeRequest(dataset, WorkerOptions(workers=width, gpus_per_worker=gpus), settings)


def find_dataset(
    encode: EncodeConfig, *, tokenizer: str, data: str, store: str | None, overrides: Sequence[str] = ()
) -> Dataset:
    """The artifacts that are meant, and a recipe around them.

    Args:
        encode: how images are encoded.
        tokenizer: a tokenizer artifact, trained or imported; a full URI brings its store along.
        data: a source of images, or `images/DIGEST` (or its full URI), which is in the tokenizer's store.
        store: where both are kept; None for the default.
        overrides: `section.field=value` of the sections data and augment.

    Raises:
        ValueError: there is no such artifact, or a setting does not fit.
    """
    found = find_artifact(tokenizer, store, "tokenizer")
    recipe = _recipe(found, encode, overrides)
    images = None
    if _IMAGES.fullmatch(data.rstrip("/")) or f"/{ROOT}/images/" in data:
        prepared = find_artifact(data, found.store.uri, "images")
        images, recipe = prepared.ref, _with_data_of(recipe, prepared)
    return Dataset(recipe, found.store, found.ref, data, images)


def _with_data_of(recipe: Recipe, images: Artifact) -> Recipe:
    """The recipe with the number of shards that the images have."""
    data = images.manifest.config["data"]
    assert isinstance(data, dict)
    shards = {name: data[name] for name in ("num_shards", "num_val_shards")}
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=shards)})


def _recipe(found: Artifact, encode: EncodeConfig, overrides: Sequence[str]) -> Recipe:
    """A recipe whose encode stage is the one that is wanted; its training stages are nobody's and are not run."""
    for override in overrides:
        section, _, field = override.partition("=")[0].strip().partition(".")
        if section not in SECTIONS or field == "image_size":
            raise ValueError(f"--set {override}: the tokenizer decides this; only {', '.join(SECTIONS)} can be set")
    model = load_config(found.folder, TokenizerFile)
    base = load_recipe("small64", overrides=overrides)
    augment = base.augment
    if not any(override.strip().startswith("augment.") for override in overrides):
        augment = AugmentConfig.model_validate(found.manifest.config.get("augment") or {})  # as it was trained with
    _check_variants(encode, augment)
    changes = {
        "name": "retokenize",
        "description": f"codes of {found.ref}; of the training stages none is run",
        "source": "",
        "data": base.data.model_copy(update={"image_size": model.image_size}),
        "augment": augment,
        "teacher": base.teacher.model_copy(update={"model": model.teacher}),
        "tokenizer": model.tokenizer,
        "encode": encode,
    }
    return Recipe.model_validate(base.model_copy(update=changes).model_dump())


def _check_variants(encode: EncodeConfig, augment: AugmentConfig) -> None:
    for variant in (*encode.variants, *encode.val_variants):
        if variant_name(variant)[0] == "affine" and not augment.is_affine:
            raise ValueError(
                f"variant {variant!r}: the tokenizer was not trained with affine changes, so nothing says how strong "
                "they are: set one, as --set augment.rotate=6"
            )
