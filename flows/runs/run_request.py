"""The request of a run: as a person writes it, and filled in, as the run's record keeps it.

`RunArguments` are the options of `sftok run` and the form of its deployment; `request` fills in what they leave open. A
`RunRequest` is stored whole in the run's record; the commands that resume or repeat a run are printed from it.
"""

import math
import os
from typing import Self

from pydantic import Field, field_validator

from flows.option_texts import ANEW, DATA, DEVICE, GPUS_PER_WORKER, OVERRIDES, RANKS, SEED, STORE, WORKERS
from flows.recipes.ablations import Ablation
from flows.recipes.changes import changes_of
from flows.recipes.files import load_recipe
from flows.recipes.registry import RECIPES
from flows.recipes.schema import Recipe
from flows.runs.command_line import command_line
from infra.artifacts.manifest import ArtifactRef
from infra.compute.device import DeviceChoice
from infra.compute.rank_count import ONE, RankCountField
from infra.compute.workers import WorkerOptions
from infra.config import Config
from infra.redaction import USER_INFO, redact
from infra.store.store import Store


class RunRequest(Config):
    """Everything a run was asked for, without credentials; the device is the recipe's, `compute.device`."""

    recipe: Recipe
    store: str = Field(description="URI of the store")
    source: str = Field(description="images: a folder, the name of a built-in source, or artifacts instead of images")
    workers: int = Field(0, ge=0, description="Ray workers; 0: none, all in one process")
    gpus_per_worker: float | None = Field(None, ge=0, description="None: 1 on CUDA, 0 on CPUs")
    ranks: RankCountField = Field(ONE, description=RANKS)
    anew: bool = Field(False, description=ANEW)
    last: str | None = Field(None, description="the stage that the run is for; None: all stages")
    given: dict[str, ArtifactRef] = Field({}, description="artifacts to use instead of running the stages named")
    ablation: Ablation | None = Field(None, description="arms and seeds of an ablation, whose base the recipe is")
    images: str | None = Field(None, description="content digest of the images of the run that is repeated")

    @field_validator("source")
    @classmethod
    def _no_credentials(cls, source: str) -> str:
        if USER_INFO.search(source):
            raise ValueError("the source carries credentials: leave them to the environment, as AWS_PROFILE")
        return source

    @property
    def device(self) -> DeviceChoice:
        """The device that it computes on, or "auto" as long as none is chosen."""
        return self.recipe.compute.device

    @property
    def options(self) -> WorkerOptions:
        """Its workers, as `map_shards` takes them."""
        return WorkerOptions(workers=self.workers, gpus_per_worker=self.gpus_per_worker or 0.0)

    @property
    def gpus(self) -> int:
        """GPUs that the run occupies: its stages follow each other, so the widest one counts."""
        each = self.gpus_per_worker
        return max(math.ceil(self.workers * each), self.ranks.most) if each else 0

    @property
    def processes(self) -> int:
        """Processes for which a Ray cluster of the run's own has room; of a range, as many as there are cores."""
        ranks = max(self.ranks.least, min(self.ranks.most, os.cpu_count() or 1))
        return max(self.workers, ranks if self.ranks.is_elastic else self.ranks.most)

    def changed(self, **changes: object) -> Self:
        """Return the request with fields changed."""
        return self.model_copy(update=changes)

    def on(self, device: str, gpus_per_worker: float) -> Self:
        """Return the request with its device chosen, and all settled that depends on it."""
        ablation = self.ablation.on(device) if self.ablation else None
        return self.changed(recipe=self.recipe.on(device), gpus_per_worker=gpus_per_worker, ablation=ablation)

    @property
    def limit(self) -> str:
        """Name of the limit that runs of its sort share on a store."""
        prefix = "" if self.last is None or self.ablation else f"{self.last.replace('_', '-')}-"
        return f"{prefix}{self.recipe.name}"

    def command(self, run: str) -> str:
        """Return the command that asks for the same: `sftok run`, or where that cannot say it, `sftok rerun` of `run`.

        No command holds credentials.
        """
        arguments = self.arguments()
        return self.rerun_command(run) if arguments is None else arguments.command()

    def rerun_command(self, run: str) -> str:
        """Return the command that repeats or resumes `run`, without credentials."""
        return redact(["sftok", "rerun", run, "--store", self.store])

    def arguments(self) -> "RunArguments | None":
        """Return the arguments of `sftok run` that make this request; None if there are none.

        There are none of partial runs, ablations, and recipes that changes of a recipe of this version do not make.
        """
        name, device = self.recipe.name, self.device
        if name not in RECIPES or self.last is not None or self.given or self.ablation is not None:
            return None
        base = RECIPES[name]()
        changes = changes_of(self.recipe, base if device == "auto" else base.on(device))
        if changes is None:
            return None
        arguments = RunArguments(
            recipe=name,
            store=self.store,
            data=self.source,
            overrides=tuple(change for change in changes if not change.startswith("compute.device=")),
            workers=self.workers,
            gpus_per_worker=self.gpus_per_worker,
            ranks=self.ranks,
            device=None if device == base.compute.device else device,
            anew=self.anew,
        )
        try:
            again = arguments.request()
        except ValueError:
            return None
        again = again if device == "auto" else again.changed(recipe=again.recipe.on(device))
        is_same = all(getattr(again, field) == getattr(self, field) for field in RunRequest.model_fields)
        return arguments if is_same else None


class RunArguments(Config):
    """A run of the whole pipeline as it is asked for; what is left open is filled in where the run begins."""

    recipe: str = Field(description="name of a recipe, or a TOML file where it is run (sftok recipes NAME --toml)")
    store: str | None = Field(None, description=STORE)
    data: str | None = Field(None, description=DATA)
    seed: int | None = Field(None, ge=0, description=SEED)
    overrides: tuple[str, ...] = Field((), description=OVERRIDES)
    workers: int | None = Field(None, ge=0, description=WORKERS)
    gpus_per_worker: float | None = Field(None, ge=0, description=GPUS_PER_WORKER)
    ranks: RankCountField = Field(ONE, description=RANKS)
    device: DeviceChoice | None = Field(None, description=f"{DEVICE}; not given: the recipe's")
    anew: bool = Field(False, description=ANEW)

    def request(self) -> RunRequest:
        """Fill in what is left open, except for what depends on the device.

        Raises:
            ValueError: one line that names what is wrong and the remedy.
        """
        device = () if self.device is None else (f"compute.device={self.device}",)
        recipe = load_recipe(self.recipe, overrides=(*self.overrides, *device), seed=self.seed)
        from sftok.sources.sources import absolute_source

        source = self.data or recipe.source
        if not source:
            raise ValueError(f"recipe {recipe.name} has no images of its own: give a folder of them with --data")
        return RunRequest(
            recipe=recipe,
            store=store_uri(self.store),
            source=absolute_source(source),
            workers=usual_workers(self.workers),
            gpus_per_worker=self.gpus_per_worker,
            ranks=self.ranks,
            anew=self.anew,
        )

    def command(self) -> str:
        """Return the command line that asks for the same, without credentials."""
        return command_line(
            ["sftok", "run", self.recipe],
            data=self.data,
            store=self.store,
            seed=self.seed,
            set=self.overrides,
            workers=self.workers,
            gpus_per_worker=self.gpus_per_worker,
            ranks=None if self.ranks == ONE else str(self.ranks),
            device=self.device,
            anew=self.anew,
        )


def store_uri(store: str | None) -> str:
    """Return the URI of a store; of the usual one if none is named."""
    return Store.usual(store).uri


def usual_workers(workers: int | None) -> int:
    """Return the number of workers; 2, or the cores if fewer, if it is left open."""
    return min(2, os.cpu_count() or 1) if workers is None else workers
