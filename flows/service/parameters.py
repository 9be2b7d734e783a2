"""Parameters of the deployed flows: typed and described, so that Prefect shows a form and rejects mistakes.

Each model knows the command that does the same by hand; notifications and crash reports give it as the way to resume.
"""

from typing import Literal

from pydantic import Field

from flows.runs.run_request import GPUS, OVERRIDES, STORE, WORKERS, RunArguments, command_line
from infra.config import Config

Overlap = Literal["wait", "cancel"]

OVERLAP = "what a second run of the same recipe on the same store does while the first is under way"


class PipelineParameters(RunArguments):
    """A run of the whole pipeline, from images to report."""

    overlap: Overlap = Field("wait", description=OVERLAP)


class RetokenizeParameters(Config):
    """A dataset through a tokenizer that is there already."""

    recipe: str = Field(description="recipe whose data and encode settings are used, and whose last tokenizer")
    tokenizer: str | None = Field(None, description="kind/digest or its beginning; empty: of the recipe's last run")
    data: str | None = Field(None, description="images, or images/DIGEST of the store; empty: the recipe's own")
    store: str | None = Field(None, description=STORE)
    overrides: tuple[str, ...] = Field(
        (), description=f"{OVERRIDES}, of the sections data, augment, encode and compute"
    )
    workers: int | None = Field(None, ge=0, description=WORKERS)
    gpus_per_worker: float | None = Field(None, ge=0, description=GPUS)
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
    run: str | None = Field(None, description="the run that is measured; empty: the last one that is done")
    against: str | None = Field(None, description="the run it is held against; empty: the last good one before it")
    gate: bool = Field(True, description="whether figures that became worse than they may fail the run")

    def command(self) -> str:
        """Return the command that does the same by hand."""
        return _deployed("benchmark-report", "nightly")


Parameters = PipelineParameters | RetokenizeParameters | CheckDataParameters | BenchmarkParameters


def plain(recipe: str) -> str:
    """Return a recipe's name, also where a TOML file is named."""
    return recipe.rpartition("/")[2].removesuffix(".toml")


def _deployed(flow: str, name: str) -> str:
    """Return the command that starts a deployment, named as `sftok serve` and infra/deploy/prefect.yaml name it."""
    return f"prefect deployment run {flow}/{name}"
