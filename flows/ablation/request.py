"""The request of `sftok ablation`: whole recipes of arms, checked before any server starts or anything is written."""

from collections.abc import Sequence

from flows.recipes.ablations import load_ablation
from flows.requests.checks import checked
from flows.runs.run_request import RunRequest, store_uri, usual_workers
from infra.compute.rank_count import RankCount


def check_ablation_request(
    name: str,
    *,
    data: str | None,
    store: str | None,
    overrides: Sequence[str],
    seeds: str | None,
    workers: int | None,
    ranks: RankCount,
    gpus: float | None = None,
) -> RunRequest:
    """Turn what the user asked for into a request that can begin."""
    from sftok.sources.sources import absolute_source

    plan = load_ablation(name, overrides=overrides, seeds=None if seeds is None else parse_seeds(seeds))
    source = data or plan.base.source
    if not source:
        raise ValueError(f"ablation {plan.name} has no images of its own: give a folder of them with --data")
    asked = RunRequest(
        recipe=plan.base,
        store=store_uri(store),
        source=absolute_source(source),
        workers=usual_workers(workers),
        gpus_per_worker=gpus,
        ranks=ranks,
        last="align",
        ablation=plan,
    )
    return checked(asked)


def parse_seeds(text: str) -> tuple[int, ...]:
    """Parse seeds as given on the command line.

    Raises:
        ValueError: one is not a whole number.
    """
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"--seeds {text}: write whole numbers with commas between them, such as 0,1,2") from None
