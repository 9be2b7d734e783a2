"""Plan what `sftok serve` runs and when: deployments with their cron schedules and parameters."""

from pathlib import Path
from typing import Any, NamedTuple

from flows.recipes.files import load_recipe
from flows.service.parameters import (
    BenchmarkParameters,
    CheckDataParameters,
    PipelineParameters,
    RetokenizeParameters,
    ServeOptions,
)
from infra.store.store import Store

OFF = "off"


class PlannedDeployment(NamedTuple):
    """A deployment to register with Prefect."""

    flow: Any  # prefect's own class, with parameters of its own
    name: str
    cron: str | None
    parameters: PipelineParameters | RetokenizeParameters | CheckDataParameters | BenchmarkParameters

    @property
    def full_name(self) -> str:
        """As Prefect's commands take it."""
        return f"{self.flow.name}/{self.name}"


def check_cron(option: str, cron: str, timezone: str) -> None:
    """Refuse a schedule that Prefect cannot read.

    Raises:
        ValueError: naming the option, the value and the remedy.
    """
    if cron == OFF:
        return
    from prefect.client.schemas.schedules import CronSchedule
    from pydantic import ValidationError

    try:
        CronSchedule(cron=cron, timezone=timezone)
    except ValidationError as error:
        if error.errors()[0]["loc"][-1:] == ("timezone",):
            raise ValueError(f"--timezone {timezone}: unknown; name one such as UTC or Europe/Berlin") from None
        raise ValueError(
            f"{option} {cron!r}: not a cron schedule; write minute, hour, day, month, weekday, such as '0 3 * * 0', "
            f"or {OFF}"
        ) from None


def plan(options: ServeOptions) -> list[PlannedDeployment]:
    """Plan the deployments, every path absolute: a scheduled run may begin anywhere."""
    from flows.service import deployments

    store = Store.usual(options.store).uri
    planned = []
    for given in options.recipes:
        name = load_recipe(given, overrides=options.overrides, seed=options.seed).name
        recipe = str(Path(given).absolute()) if given.endswith(".toml") else given
        asked = options.arguments(recipe).model_copy(update={"store": store})
        whole = PipelineParameters(**asked.model_dump(), overlap=options.overlap)
        again = RetokenizeParameters(
            **asked.model_dump(include=set(RetokenizeParameters.model_fields) - {"overrides"}),
            overrides=tuple(
                one for one in options.overrides if one.split(".")[0] in ("data", "augment", "encode", "compute")
            ),
            overlap=options.overlap,
        )
        check = CheckDataParameters(retokenize=again, deployment=f"retokenize/{name}")
        planned += [
            PlannedDeployment(deployments.pipeline, name, _cron(options.pipeline_cron), whole),
            PlannedDeployment(deployments.retokenize, name, None, again),
            PlannedDeployment(deployments.check_data, name, _cron(options.check_cron), check),
        ]
    report = BenchmarkParameters(store=store)
    return [*planned, PlannedDeployment(deployments.benchmark_report, "nightly", _cron(options.report_cron), report)]


def _cron(text: str) -> str | None:
    return None if text == OFF else text
