"""What `sftok train-generator` was asked for, checked before a server starts."""

from collections.abc import Sequence
from typing import NamedTuple

from flows.recipes.files import load_recipe
from flows.recipes.schema import Recipe
from flows.requests.checks import check_compilers, check_servers, check_share, on_device
from flows.requests.precisions import warn_of_slow
from infra.artifacts.lineage import find_artifact
from infra.artifacts.manifest import ArtifactRef
from infra.settings import Settings
from infra.store.store import Store

SECTIONS = ("generator", "train_generator", "compute")  # of a recipe, that decide a generator of codes that are there
SINGLE = ("seed", "threads")


class GeneratorRequest(NamedTuple):
    """A generator's training that can begin."""

    recipe: Recipe
    store: Store
    codes: ArtifactRef
    ranks: int
    settings: Settings


def check_generator_request(
    recipe: str, *, codes: str, store: str | None, overrides: Sequence[str], ranks: int, seed: int | None
) -> GeneratorRequest:
    """Turn what the user asked for into a request, the store last: checking it writes to it.

    Raises:
        ValueError: one line that names what is wrong and the remedy.
    """
    settings = Settings()
    for override in overrides:
        section = override.partition("=")[0].strip()
        if section not in SINGLE and section.partition(".")[0] not in SECTIONS:
            allowed = ", ".join((*SECTIONS, *SINGLE))
            raise ValueError(f"--set {override}: the codes are there already; only {allowed} can be set")
    chosen = load_recipe(recipe, overrides=overrides, seed=seed)
    check_share("train_generator", chosen.train_generator, ranks)
    chosen, _ = on_device(chosen, gpus=None, ranks=ranks, settings=settings)
    check_compilers(chosen.train_generator.compile, device=chosen.compute.device, settings=settings)
    found = find_artifact(codes, store, "codes")
    check_servers(settings)
    found.store.check()
    chosen_precision = {"train_generator.precision": chosen.train_generator.precision}
    warn_of_slow(chosen_precision, settings, chosen.compute.device)
    return GeneratorRequest(chosen, found.store, found.ref, ranks, settings)
