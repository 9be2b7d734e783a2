"""The request of `sftok encode`: images, a tokenizer that is there already, and the recipe that its stages run by."""

import re
from collections.abc import Sequence

from flows.recipes.files import load_recipe
from flows.recipes.schema import EncodeConfig, Recipe
from flows.requests.checks import checked
from flows.runs.run_request import RunRequest, usual_workers
from infra.artifacts.artifact import Artifact
from infra.artifacts.lineage import find_artifact
from infra.artifacts.manifest import ROOT
from infra.artifacts.weights import load_config
from sftok.config import AugmentConfig
from sftok.images.views import variant_name
from sftok.sources.sources import absolute_source
from sftok.weights.artifacts import TokenizerFile

SECTIONS = ("data", "augment", "compute")  # of a recipe, beside `encode`, that decide codes and are not the tokenizer's
_IMAGES = re.compile(r"images/[0-9a-f]{4,}")


def check_encode_request(
    encode: EncodeConfig,
    *,
    tokenizer: str,
    data: str,
    store: str | None,
    overrides: Sequence[str],
    workers: int | None,
    gpus_per_worker: float | None,
    anew: bool = False,
) -> RunRequest:
    """Turn what the user asked for into a request that can begin.

    Raises:
        ValueError: one line that names what is wrong and the remedy.
    """
    asked = encode_request(encode, tokenizer=tokenizer, data=data, store=store, overrides=overrides)
    width = {"workers": usual_workers(workers), "gpus_per_worker": gpus_per_worker, "anew": anew}
    return checked(asked.changed(**width), flags={"encode.precision": "--precision"})


def encode_request(
    encode: EncodeConfig, *, tokenizer: str, data: str, store: str | None, overrides: Sequence[str] = ()
) -> RunRequest:
    """Ask for codes with settings of the sections data, augment and compute, as `section.field=value`.

    Raises:
        ValueError: there is no such artifact, or a setting does not fit.
    """
    for override in overrides:
        section, _, field = override.partition("=")[0].strip().partition(".")
        if section not in SECTIONS or field == "image_size":
            raise ValueError(f"--set {override}: the tokenizer decides this; only {', '.join(SECTIONS)} can be set")
    recipe = load_recipe("small64", overrides=overrides).model_copy(update={"encode": encode})
    return request_to_encode(
        recipe, tokenizer=tokenizer, data=data, store=store, is_augmented=changes_augmentation(overrides)
    )


def changes_augmentation(overrides: Sequence[str]) -> bool:
    """Return whether any of these changes is one of augmentation."""
    return any(override.strip().startswith("augment.") for override in overrides)


def request_to_encode(
    recipe: Recipe, *, tokenizer: str, data: str, store: str | None, is_augmented: bool
) -> RunRequest:
    """Ask for the codes that a tokenizer of the store and a recipe make of images.

    Args:
        recipe: whose sections data, augment, encode and compute are meant; its training stages are not run.
        tokenizer: a tokenizer artifact, trained or imported; a full URI brings its store along.
        data: a source of images, or `images/DIGEST` (or its full URI), which is in the tokenizer's store.
        store: where both are kept; None for the default.
        is_augmented: use the recipe's augmentation instead of the one that the tokenizer was trained with.

    Raises:
        ValueError: there is no such artifact, or a setting does not fit.
    """
    found = find_artifact(tokenizer, store, "tokenizer")
    given, source = {"fine_tune": found.ref}, absolute_source(data)
    recipe = _with_tokenizer(recipe, found, is_augmented=is_augmented)
    if _IMAGES.fullmatch(data.rstrip("/")) or f"/{ROOT}/images/" in data:
        prepared = find_artifact(data, found.store.uri, "images")
        given["prepare"], recipe, source = prepared.ref, _with_data_of(recipe, prepared), data
    return RunRequest(recipe=recipe, store=found.store.uri, source=source, last="encode", given=given)


def _with_data_of(recipe: Recipe, images: Artifact) -> Recipe:
    """Return the recipe with the number of shards that the images have."""
    data = images.manifest.config["data"]
    assert isinstance(data, dict)
    shards = {name: data[name] for name in ("num_shards", "num_val_shards")}
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=shards)})


def _with_tokenizer(recipe: Recipe, found: Artifact, *, is_augmented: bool) -> Recipe:
    """Return the recipe with the models of the tokenizer, which decide the size of images."""
    model = load_config(found.folder, TokenizerFile)
    augment = recipe.augment
    if not is_augmented:
        augment = AugmentConfig.model_validate(found.manifest.config.get("augment") or {})  # as it was trained with
    _check_variants(recipe.encode, augment)
    changes = {
        "name": "retokenize",
        "description": f"codes of {found.ref}; of the training stages none is run",
        "source": "",
        "data": recipe.data.model_copy(update={"image_size": model.image_size}),
        "augment": augment,
        "teacher": recipe.teacher.model_copy(update={"model": model.teacher}),
        "tokenizer": model.tokenizer,
    }
    return Recipe.model_validate(recipe.model_copy(update=changes).model_dump())


def _check_variants(encode: EncodeConfig, augment: AugmentConfig) -> None:
    for variant in (*encode.variants, *encode.val_variants):
        if variant_name(variant)[0] == "affine" and not augment.is_affine:
            raise ValueError(
                f"variant {variant!r}: the tokenizer was not trained with affine changes, so nothing says how strong "
                "they are: set one, as --set augment.rotate=6"
            )
