"""What the deployed flows are asked for: typed and described, so that Prefect shows a form and refuses mistakes.

Each model knows the command that does the same by hand; notifications and crash reports give it as the way to go on.
"""

from typing import Literal

from pydantic import Field

from infra.config import Config
from infra.provenance import redact

Overlap = Literal["wait", "cancel"]

STORE = "folder or s3://bucket/prefix of the artifacts; empty: SFTOK_STORE where the run is executed, or ./store"
OVERRIDES = "settings that are changed, as section.field=value"
WORKERS = "Ray workers; 0: none, all in one process; empty: 2, or the cores if fewer"
GPUS = "GPUs of a Ray worker; 0.5 lets two share one; empty: 1 where there are GPUs"
OVERLAP = "what a second run of the same recipe on the same store does while the first is under way"


class PipelineParameters(Config):
    """A run of the whole pipeline, from images to report."""

    recipe: str = Field(description="name of a recipe (sftok recipes), or a TOML file where the run is executed")
    store: str | None = Field(None, description=STORE)
    data: str | None = Field(None, description="images, as `sftok run --data` takes them; empty: the recipe's own")
    seed: int | None = Field(None, ge=0, description="seed of everything random; empty: the recipe's")
    overrides: tuple[str, ...] = Field((), description=OVERRIDES)
    workers: int | None = Field(None, ge=0, description=WORKERS)
    gpus_per_worker: float | None = Field(None, ge=0, description=GPUS)
    ranks: int = Field(1, ge=1, description="training processes, which share a step's micro-batches")
    overlap: Overlap = Field("wait", description=OVERLAP)

    def command(self) -> str:
        """The same by hand."""
        return _command(
            ["sftok", "run", self.recipe],
            data=self.data,
            store=self.store,
            seed=self.seed,
            set=self.overrides,
            workers=self.workers,
            gpus_per_worker=self.gpus_per_worker,
            ranks=self.ranks if self.ranks > 1 else None,
        )


class RetokenizeParameters(Config):
    """A dataset through a tokenizer that is there already."""

    recipe: str = Field(description="recipe whose data and encode settings are used, and whose last tokenizer")
    tokenizer: str | None = Field(None, description="kind/digest or its beginning; empty: of the recipe's last run")
    data: str | None = Field(None, description="images, or images/DIGEST of the store; empty: the recipe's own")
    store: str | None = Field(None, description=STORE)
    overrides: tuple[str, ...] = Field((), description=f"{OVERRIDES}, of the sections data, augment and encode")
    workers: int | None = Field(None, ge=0, description=WORKERS)
    gpus_per_worker: float = Field(0.0, ge=0, description="GPUs a worker; 0.5 lets two share one")
    overlap: Overlap = Field("wait", description=OVERLAP)

    def command(self) -> str:
        """The same by hand."""
        if self.tokenizer is None or self.data is None or any(one.startswith("encode.") for one in self.overrides):
            return _deployed("retokenize", plain(self.recipe))  # which fills them in
        return _command(
            ["sftok", "encode"],
            tokenizer=self.tokenizer,
            data=self.data,
            store=self.store,
            set=self.overrides,
            workers=self.workers,
            gpus_per_worker=self.gpus_per_worker or None,
        )


class CheckDataParameters(Config):
    """A look at the data, and a re-tokenization if they have changed."""

    retokenize: RetokenizeParameters = Field(description="what is started if the data have changed")
    deployment: str = Field("retokenize/retokenize", description="the deployment that does it, as FLOW/NAME")

    def command(self) -> str:
        """The same by hand."""
        return _deployed("check-data", plain(self.retokenize.recipe))


class BenchmarkParameters(Config):
    """Measurements of a run, and the regression gate."""

    store: str | None = Field(None, description=STORE)
    run: str | None = Field(None, description="the run that is measured; empty: the last one that is done")
    against: str | None = Field(None, description="the run it is held against; empty: the last good one before it")
    gate: bool = Field(True, description="whether figures that became worse than they may fail the run")

    def command(self) -> str:
        """The same by hand."""
        return _deployed("benchmark-report", "nightly")


Parameters = PipelineParameters | RetokenizeParameters | CheckDataParameters | BenchmarkParameters


def plain(recipe: str) -> str:
    """A recipe's name, also where a TOML file is named."""
    return recipe.rpartition("/")[2].removesuffix(".toml")


def _deployed(flow: str, name: str) -> str:
    """Start a deployment with its own parameters, named as `sftok serve` and infra/deploy/prefect.yaml name it."""
    return f"prefect deployment run {flow}/{name}"


def _command(words: list[str], **options: str | int | float | tuple[str, ...] | None) -> str:
    """A command line to copy, without credentials."""
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        for one in value if isinstance(value, tuple) else (value,):
            if one is not None:
                words += [flag, f"{one:g}" if isinstance(one, float) else str(one)]
    return redact(words)
