"""Tell whether the images of a recipe have changed since they were encoded, and ask for the encoding if so."""

from typing import NamedTuple

from flows.pipeline.graph import ENCODE, PREPARE
from flows.recipes.files import load_recipe
from flows.recipes.schema import Recipe
from flows.requests.encode import changes_augmentation, request_to_encode
from flows.runs.history import records, ref_of
from flows.runs.run_request import RunRequest, store_uri, usual_workers
from flows.service.parameters import RetokenizeParameters
from flows.stage import StageJob, plan_of
from infra.artifacts.inventory import manifests
from infra.artifacts.manifest import ArtifactRef, Manifest, find
from infra.artifacts.manifest import ref_of as ref_of_manifest
from infra.store.store import Store


class Verdict(NamedTuple):
    """Says whether the images have changed."""

    changed: bool
    reason: str
    images: int
    """that were listed, or files that hold them."""


def request_of(parameters: RetokenizeParameters) -> RunRequest:
    """Fill in what was left out by what the recipe says.

    Augmentation is as the tokenizer was trained with, unless it is named.

    Raises:
        ValueError: no such recipe, it has no images of its own, or no run of it has made a tokenizer yet.
    """
    store = store_uri(parameters.store)
    recipe = load_recipe(parameters.recipe, overrides=parameters.overrides)
    data = parameters.data or recipe.source
    if not data:
        raise ValueError(f"recipe {recipe.name} has no images of its own: name them in data")
    tokenizer = parameters.tokenizer or last_tokenizer(Store(store), recipe.name)
    if tokenizer is None:
        raise ValueError(
            f"no run of recipe {recipe.name} has made a tokenizer in {store} yet: run the pipeline once, or name "
            "one in tokenizer"
        )
    is_augmented = changes_augmentation(parameters.overrides)
    request = request_to_encode(recipe, tokenizer=tokenizer, data=data, store=store, is_augmented=is_augmented)
    return request.changed(workers=usual_workers(parameters.workers), gpus_per_worker=parameters.gpus_per_worker)


def last_tokenizer(store: Store, recipe: str) -> str | None:
    """Return the tokenizer of the recipe's last run that has one."""
    for record in reversed(records(store)):
        if record.recipe.name == recipe and (ref := ref_of(record, "fine_tune")) is not None:
            return str(ref)
    return None


def look(request: RunRequest) -> Verdict:
    """List the images once, and compare with the newest that were prepared with the same settings.

    Unchanged means also that their codes by this tokenizer are there: a re-tokenization that failed is tried again.
    """
    from sftok.sources.sources import list_source

    if (images := request.given.get("prepare")) is not None:
        return _verdict(request, images, 0)
    source = list_source(request.source, request.recipe.data)
    count = len(source.entries) or len(source.containers)
    store = Store(request.store)
    newest = _newest_images(store, request.recipe)
    if newest is None:
        return Verdict(True, "these images were never prepared with these settings", count)
    if newest.config["listing"] != source.digest:
        return Verdict(True, f"the listing differs from that of images/{newest.digest}", count)
    return _verdict(request, ref_of_manifest(store, newest), count)


def _verdict(request: RunRequest, images: ArtifactRef, count: int) -> Verdict:
    job = StageJob.of(request)
    plan = plan_of(ENCODE, job, {"images": images, "tokenizer": request.given["fine_tune"]})
    if find(job.store, plan) is None:
        return Verdict(True, f"the codes of images/{images.digest} are not there", count)
    return Verdict(False, f"nothing changed: images/{images.digest} and their codes are up to date", count)


def _newest_images(store: Store, recipe: Recipe) -> Manifest | None:
    data = recipe.data.identity()
    same = [one for one in manifests(store, PREPARE.kind).values() if one.config.get("data") == data]
    return max(same, key=lambda one: one.created_at, default=None)
