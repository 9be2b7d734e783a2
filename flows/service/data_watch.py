"""What a re-tokenization means for a recipe, and whether its images have changed since the last one."""

from typing import NamedTuple

from flows.pipeline.graph import ENCODE, PREPARE
from flows.recipes.changes import changes_of
from flows.recipes.files import load_recipe
from flows.recipes.schema import EncodeConfig, Recipe
from flows.requests.encode import Dataset, find_dataset
from flows.runs.history import records, ref_of
from flows.service.parameters import RetokenizeParameters
from flows.stage import Job, plan_of
from infra.artifacts.inventory import manifests
from infra.artifacts.manifest import ArtifactRef, Manifest, find
from infra.artifacts.manifest import ref_of as ref_of_manifest
from infra.compute.workers import WorkerOptions
from infra.settings import Settings
from infra.store.store import Store


class Wanted(NamedTuple):
    """The arguments of `sftok encode` that a recipe stands for."""

    encode: EncodeConfig
    tokenizer: str
    data: str
    store: Store
    overrides: tuple[str, ...]


class Verdict(NamedTuple):
    """Whether there is something to do."""

    changed: bool
    reason: str
    images: int
    """that were listed, or files that hold them."""


def wanted_of(parameters: RetokenizeParameters) -> Wanted:
    """Fill in what was left out by what the recipe says.

    Raises:
        ValueError: no such recipe, it has no images of its own, or no run of it has made a tokenizer yet.
    """
    store = Store(parameters.store or Settings().store)
    recipe = load_recipe(parameters.recipe, overrides=parameters.overrides)
    data = parameters.data or recipe.source
    if not data:
        raise ValueError(f"recipe {recipe.name} has no images of its own: name them in data")
    tokenizer = parameters.tokenizer or last_tokenizer(store, recipe.name)
    if tokenizer is None:
        raise ValueError(
            f"no run of recipe {recipe.name} has made a tokenizer in {store.uri} yet: run the pipeline once, or name "
            "one in tokenizer"
        )
    return Wanted(recipe.encode, tokenizer, data, store, _data_settings(recipe, parameters.overrides))


def last_tokenizer(store: Store, recipe: str) -> str | None:
    """The tokenizer of the recipe's last run that has one."""
    for record in reversed(records(store)):
        if record.recipe.name == recipe and (ref := ref_of(record, "fine_tune")) is not None:
            return str(ref)
    return None


def look(wanted: Wanted) -> Verdict:
    """List the images once, and compare with the newest that were prepared with the same settings.

    Unchanged means also that their codes by this tokenizer are there: a re-tokenization that failed is tried again.
    """
    from sftok.sources.sources import list_source

    dataset = find_dataset(
        wanted.encode,
        tokenizer=wanted.tokenizer,
        data=wanted.data,
        store=wanted.store.uri,
        overrides=wanted.overrides,
    )
    if dataset.images is not None:
        return _verdict(dataset, dataset.images, 0)
    source = list_source(wanted.data, dataset.recipe.data)
    count = len(source.entries) or len(source.containers)
    newest = _newest_images(wanted.store, dataset)
    if newest is None:
        return Verdict(True, "these images were never prepared with these settings", count)
    if newest.config["listing"] != source.digest:
        return Verdict(True, f"the listing differs from that of images/{newest.digest}", count)
    return _verdict(dataset, ref_of_manifest(wanted.store, newest), count)


def _verdict(dataset: Dataset, images: ArtifactRef, count: int) -> Verdict:
    job = Job(dataset.recipe, dataset.store, dataset.source, WorkerOptions())
    plan = plan_of(ENCODE, job, {"images": images, "tokenizer": dataset.tokenizer})
    if find(dataset.store, plan) is None:
        return Verdict(True, f"the codes of images/{images.digest} are not there", count)
    return Verdict(False, f"nothing changed: images/{images.digest} and their codes are up to date", count)


def _newest_images(store: Store, dataset: Dataset) -> Manifest | None:
    """The newest images of these settings."""
    data = dataset.recipe.data.identity()
    same = [one for one in manifests(store, PREPARE.kind).values() if one.config.get("data") == data]
    return max(same, key=lambda one: one.created_at, default=None)


def _data_settings(recipe: Recipe, overrides: tuple[str, ...]) -> tuple[str, ...]:
    """The recipe's data settings, as overrides of those that `sftok encode` begins with; the tokenizer knows the rest.

    Augmentation is as the tokenizer was trained with, unless it is named.
    """
    base = load_recipe("small64")
    wanted = recipe.data.model_copy(update={"image_size": base.data.image_size})
    changed = changes_of(base.model_copy(update={"data": wanted}), base) or ()
    return (*changed, *(one for one in overrides if one.strip().startswith("augment.")))
