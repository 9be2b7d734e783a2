"""Check the request of an ablation before any server starts or anything is written."""

import os
from collections.abc import Sequence
from typing import NamedTuple

from flows.recipes.ablations import Ablation, load_ablation
from flows.recipes.schema import Recipe
from flows.requests.checks import check_ranks, check_servers, check_weights, on_device
from flows.requests.precisions import precisions_of, warn_of_slow
from infra.settings import Settings
from infra.store.store import Store
from sftok.config import NO_ADVERSARY


class AblationRequest(NamedTuple):
    """A checked request, ready to run."""

    plan: Ablation
    store: Store
    source: str
    workers: int
    ranks: int
    gpus_per_worker: float
    settings: Settings


def check_ablation_request(
    name: str,
    *,
    data: str | None,
    store: str | None,
    overrides: Sequence[str],
    seeds: str | None,
    workers: int | None,
    ranks: int,
    gpus: float | None = None,
) -> AblationRequest:
    """Check the user's arguments and make a request of them; the store comes last, since checking it writes to it.

    Raises:
        ValueError: one line that names the problem and the remedy.
    """
    from sftok.sources.sources import check_source

    settings = Settings()
    plan = load_ablation(name, overrides=overrides, seeds=None if seeds is None else parse_seeds(seeds))
    base = plan.base
    check_weights(_without_fine_tuning(base))
    check_ranks(base, ranks)
    settled, each = on_device(base, gpus=gpus, ranks=ranks, settings=settings)
    plan = plan.on(settled.compute.device)
    judged = ("warm_up", "align", "decoding")  # an ablation ends with the second
    chosen = {name: value for name, value in precisions_of(settled).items() if name.startswith(judged)}
    warn_of_slow(chosen, settings, settled.compute.device)
    source = data or base.source
    if not source:
        raise ValueError(f"ablation {plan.name} has no images of its own: give a folder of them with --data")
    check_source(source, base.data)
    check_servers(settings)
    place = Store(store or settings.store)
    place.check()
    width = min(2, os.cpu_count() or 1) if workers is None else workers
    return AblationRequest(plan, place, source, width, ranks, each, settings)


def parse_seeds(text: str) -> tuple[int, ...]:
    """Parse seeds as given on the command line.

    Raises:
        ValueError: one is not a whole number.
    """
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"--seeds {text}: write whole numbers with commas between them, such as 0,1,2") from None


def _without_fine_tuning(recipe: Recipe) -> Recipe:
    """Remove what fine-tuning needs weights for: an ablation ends before it."""
    changes = {"perceptual_weight": 0.0, "adversarial": NO_ADVERSARY}
    return recipe.model_copy(update={"fine_tune": recipe.fine_tune.model_copy(update=changes)})
