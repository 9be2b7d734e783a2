"""The request of `sftok train-generator`: a recipe's generator, and codes that are there already."""

from collections.abc import Sequence

from flows.recipes.files import load_recipe
from flows.requests.checks import checked
from flows.runs.run_request import RunRequest
from infra.artifacts.lineage import find_artifact
from infra.compute.rank_count import RankCount

SECTIONS = ("generator", "train_generator", "compute")  # of a recipe, that decide a generator of codes that are there
SINGLE = ("seed", "threads")


def check_generator_request(
    recipe: str, *, codes: str, store: str | None, overrides: Sequence[str], ranks: RankCount, seed: int | None
) -> RunRequest:
    """Turn what the user asked for into a request that can begin.

    Raises:
        ValueError: one line that names what is wrong and the remedy.
    """
    for override in overrides:
        section = override.partition("=")[0].strip()
        if section not in SINGLE and section.partition(".")[0] not in SECTIONS:
            allowed = ", ".join((*SECTIONS, *SINGLE))
            raise ValueError(f"--set {override}: the codes are there already; only {allowed} can be set")
    chosen = load_recipe(recipe, overrides=overrides, seed=seed)
    found = find_artifact(codes, store, "codes")
    given = {"encode": found.ref}
    asked = RunRequest(recipe=chosen, store=found.store.uri, source=str(found.ref), last="train_generator", given=given)
    return checked(asked.changed(ranks=ranks))
