"""What a stage is: the config and inputs that identify its artifact, and the one library call that makes it."""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from pydantic import JsonValue

from flows.recipes.small import ComputeConfig, Recipe
from infra.artifacts.made_on import decisive, said, shards_begun_on
from infra.artifacts.manifest import ArtifactRef, Manifest, Plan, files_of, folder_of, key_of, manifest_of
from infra.artifacts.pages import Page
from infra.artifacts.shards import FileEntry, split_of
from infra.compute.ranks import ALONE, Ranks
from infra.compute.workers import WorkerOptions
from infra.progress import Progress
from infra.store.store import Store

if TYPE_CHECKING:
    from infra.training.loop import Run
    from sftok.sources.listing import Source

log = logging.getLogger(__name__)

Refs = Mapping[str, ArtifactRef]

CPU = "cpu"


class Listing:
    """Hands the source that an attempt has listed to name its artifact on to the call that reads the images.

    One listing at most is held, in memory or a temporary file, until it is taken; other processes get an empty holder.
    """

    def __init__(self) -> None:
        self._held: tuple[str, Source] | None = None

    def put(self, digest: str, source: "Source") -> None:
        """Hold a listing, instead of one that was held."""
        self._held = digest, source

    def take(self, digest: str) -> "Source | None":
        """The listing if it has this digest; none is held afterwards."""
        held, self._held = self._held, None
        return held[1] if held is not None and held[0] == digest else None

    def drop(self) -> None:
        """Hold none: nobody will read the images."""
        self._held = None

    def __reduce__(self) -> tuple[type["Listing"], tuple[()]]:
        return Listing, ()


class Job(NamedTuple):
    """One run of a recipe: where it reads and writes, and how wide it runs."""

    recipe: Recipe
    store: Store
    source: str
    workers: WorkerOptions
    run: str = ""
    ranks: int = 1
    listing: Listing | None = None  # between the parts of an attempt; without it each lists the source itself
    anew: bool = False  # give up shards that were begun on another kind of device

    @property
    def device(self) -> str:
        """Where its stages compute: "cpu" or "cuda"."""
        from infra.compute.device import default_device

        chosen = self.recipe.compute.device
        return default_device() if chosen == "auto" else chosen

    def settled(self) -> "Job":
        """The job with its device chosen, and what depends on it; who has looked at the cluster has done so before."""
        recipe = self.recipe.on(self.device)
        return self if recipe == self.recipe else self._replace(recipe=recipe)


class Result(NamedTuple):
    """What a stage's library call leaves behind in its folder."""

    files: list[FileEntry]
    counts: dict[str, int]
    metrics: dict[str, float]
    content_digest: str | None = None
    pages: Sequence[Page] = ()  # where the stage has listed its shards itself


class Work(NamedTuple):
    """Everything one stage's call may use."""

    job: Job
    plan: Plan
    out: Store
    progress: Progress
    ranks: Ranks = ALONE

    @property
    def recipe(self) -> Recipe:
        """The run's recipe, settled for its device."""
        return self.job.settled().recipe

    def folder(self, name: str) -> Store:
        """The folder of the input called `name`."""
        ref = self.plan.inputs[name]
        return folder_of(self.job.store, ref.kind, ref.digest)

    def keys(self, name: str, split: str) -> list[str]:
        """Keys of the input's shards of a split: where in the store each of them lies."""
        manifest = manifest_of(self.job.store, self.plan.inputs[name])
        files = files_of(self.job.store, manifest)
        return [key_of(manifest, file) for file in files if split_of(file.path) == split]

    def rows(self, name: str, split: str) -> dict[str, int]:
        """The same keys, each with the rows that the manifest says are there."""
        manifest = manifest_of(self.job.store, self.plan.inputs[name])
        files = files_of(self.job.store, manifest)
        return {key_of(manifest, file): file.rows or 0 for file in files if split_of(file.path) == split}

    def ref(self, name: str) -> ArtifactRef:
        """The input called `name`."""
        return self.plan.inputs[name]


class Stage(NamedTuple):
    """A named step of the pipeline."""

    name: str
    kind: str
    version: int  # raised by hand when the same config gives another artifact
    what: Callable[[Job], dict[str, JsonValue]]
    call: Callable[[Work], Result]
    is_trained: bool = False  # by as many ranks as the job has
    is_measured: bool = False  # by one process, where a GPU is if the job has any
    accept: Callable[[Job, Manifest], None] | None = None  # refuses what was made under other conditions


def plan_of(stage: Stage, job: Job, inputs: Refs) -> Plan:
    """Identify the artifact that `stage` makes of `inputs`."""
    job = job.settled()
    return Plan(kind=stage.kind, version=stage.version, config=stage.what(job), inputs=dict(inputs))


def shards(job: Job) -> JsonValue:
    """How the images are divided: the same images make other files, and are streamed in another order."""
    return [job.recipe.data.num_shards, job.recipe.data.num_val_shards]


def seeded(job: Job) -> dict[str, JsonValue]:
    """What decides a stage's random numbers and the rounding of its sums."""
    return {"seed": job.recipe.seed, "threads": job.recipe.threads}


def computed(compute: ComputeConfig) -> dict[str, JsonValue]:
    """What decides the rounding of a stage that computes on a GPU; nothing on CPUs, as it always was."""
    return {} if compute.device == CPU else {"compute": compute.as_json()}


def worker_facts(compute: ComputeConfig, options: WorkerOptions) -> dict[str, str]:
    """Facts of the device that workers compute on; asks one of them where this process may differ."""
    from infra.compute.device import device_facts
    from infra.compute.workers import map_shards
    from infra.settings import Settings

    ask = functools.partial(device_facts, compute.device, compute.numerics)
    if options.workers == 0 or (compute.device == CPU and not Settings().ray_address):
        return ask()
    one = options.model_copy(update={"workers": 1})
    return map_shards(functools.partial(_asking, ask), [None], options=one)[0]


def _asking(ask: Callable[[], dict[str, str]]) -> Callable[[None], dict[str, str]]:
    return lambda _: ask()


def give_up_others(out: Store, compute: ComputeConfig, options: WorkerOptions) -> None:
    """Delete the unfinished shards in an artifact's folder that another kind of device than the workers' has begun."""
    begun = shards_begun_on(out)
    if begun is None or begun == (own := decisive(worker_facts(compute, options))):
        return
    log.warning("%s was begun on %s; it is made anew on %s", out.uri, said(begun), said(own))
    out.delete_tree()


def training_run(work: Work) -> "Run":
    """Where and how a training goes on."""
    from infra.training.loop import Run

    recipe = work.recipe
    device, numerics = work.job.device, recipe.compute.numerics
    return Run(work.out, recipe.seed, recipe.threads, device, work.progress, work.ranks, numerics)
