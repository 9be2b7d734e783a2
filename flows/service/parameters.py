"""Parameters of the deployed flows: typed and described, so that Prefect shows a form and rejects mistakes.

Each model knows the command that does the same by hand; notifications and crash reports give it as the way to resume.
"""

from typing import Literal

from pydantic import Field

from flows.option_texts import GPUS_PER_WORKER, OVERLAP, OVERRIDES, RANKS, SEED, STORE, WORKERS
from flows.runs.command_line import command_line
from flows.runs.run_request import RunArguments
from infra.compute.rank_count import ONE, RankCountField
from infra.config import Config

Overlap = Literal["wait", "cancel"]


class PipelineParameters(RunArguments):
    """A run of the whole pipeline, from images to report."""

    overlap: Overlap = Field("wait", description=OVERLAP)


class RetokenizeParameters(Config):
    """A dataset through a tokenizer that is there already."""

    recipe: str = Field(description="recipe whose data and encode settings are used, and whose last tokenizer")
    tokenizer: str | None = Field(None, description="kind/digest or its beginning; not given: of the recipe's last run")
    data: str | None = Field(None, description="images, or images/DIGEST of the store; not given: the recipe's own")
    store: str | None = Field(None, description=STORE)
    overrides: tuple[str, ...] = Field(
        (), description=f"{OVERRIDES}, of the sections data, augment, encode and compute"
    )
    workers: int | None = Field(None, ge=0, description=WORKERS)
    gpus_per_worker: float | None = Field(None, ge=0, description=GPUS_PER_WORKER)
    overlap: Overlap = Field("wait", description=OVERLAP)

    def command(self) -> str:
        """Return the command that does the same by hand."""
        if self.tokenizer is None or self.data is None or any(one.startswith("encode.") for one in self.overrides):
            return _deployed("retokenize", plain(self.recipe))  # which fills them in
        return command_line(
            ["sftok", "encode"],
            tokenizer=self.tokenizer,
            data=self.data,
            store=self.store,
            set=self.overrides,
            workers=self.workers,
            gpus_per_worker=self.gpus_per_worker,
        )


class CheckDataParameters(Config):
    """A check of the data, and a re-tokenization if they have changed."""

    retokenize: RetokenizeParameters = Field(description="what is started if the data have changed")
    deployment: str = Field("retokenize/retokenize", description="the deployment that does it, as FLOW/NAME")

    def command(self) -> str:
        """Return the command that does the same by hand."""
        return _deployed("check-data", plain(self.retokenize.recipe))


class BenchmarkParameters(Config):
    """Measurements of a run, and the regression gate."""

    store: str | None = Field(None, description=STORE)
    run: str | None = Field(None, description="the run that is measured; not given: the last one that is done")
    against: str | None = Field(None, description="the run it is held against; not given: the last good one before it")
    gate: bool = Field(True, description="whether figures that became worse than they may fail the run")

    def command(self) -> str:
        """Return the command that does the same by hand."""
        return _deployed("benchmark-report", "nightly")


class ServeOptions(Config):
    """The recipes that are served, and their schedules."""

    recipes: tuple[str, ...] = Field(("digits",), min_length=1, description="recipe with deployments of its own")
    data: str | None = Field(None, description="images, as `sftok run --data` takes them; not given: the recipes' own")
    store: str | None = Field(None, description=STORE)
    overrides: tuple[str, ...] = Field((), description=f"{OVERRIDES}, in all of them")
    seed: int | None = Field(None, ge=0, description=SEED)
    workers: int | None = Field(None, ge=0, description=WORKERS)
    gpus_per_worker: float | None = Field(None, ge=0, description=GPUS_PER_WORKER)
    ranks: RankCountField = Field(ONE, description=RANKS)
    overlap: Overlap = Field("wait", description=OVERLAP)
    pipeline_cron: str = Field("0 3 * * 0", description="when the whole pipeline runs, or off")
    check_cron: str = Field(
        "0 1 * * *", description="when the data are listed, and encoded if they have changed, or off"
    )
    report_cron: str = Field("0 5 * * *", description="when the last run is measured, or off")
    timezone: str = Field("UTC", description="time zone of the schedules, such as Europe/Berlin")
    gpus: int | None = Field(None, ge=1, description="GPUs that all runs share; not given: as set before")
    port: int = Field(4200, ge=1, le=65535, description="port of the server, unless PREFECT_API_URL names one")

    def arguments(self, recipe: str) -> RunArguments:
        """Return what a run of a recipe is asked for."""
        return RunArguments(recipe=recipe, **self.model_dump(include=set(RunArguments.model_fields)))


Parameters = PipelineParameters | RetokenizeParameters | CheckDataParameters | BenchmarkParameters


def plain(recipe: str) -> str:
    """Return a recipe's name, also where a TOML file is named."""
    return recipe.rpartition("/")[2].removesuffix(".toml")


def _deployed(flow: str, name: str) -> str:
    """Return the command that starts a deployment, named as `sftok serve` and infra/deploy/prefect.yaml name it."""
    return f"prefect deployment run {flow}/{name}"
