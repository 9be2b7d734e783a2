"""Stages of the pipeline: the config and inputs that identify an artifact, and the one library call that makes it."""

import functools
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from pydantic import JsonValue

from flows.recipes.schema import ComputeConfig, Recipe
from flows.runs.run_request import RunRequest
from infra.artifacts.artifact import Artifact
from infra.artifacts.made_on import decisive, describe_kind, shards_begun_on
from infra.artifacts.manifest import ArtifactPlan, ArtifactRef, Manifest, folder_of
from infra.artifacts.pages import Page
from infra.artifacts.shards import FileEntry
from infra.compute.rank_count import ONE, RankCount
from infra.compute.ranks import ALONE, Ranks
from infra.compute.workers import WorkerOptions
from infra.progress import Progress
from infra.store.store import Store

if TYPE_CHECKING:
    from infra.training.loop import TrainingRun
    from sftok.sources.listing import Source

log = logging.getLogger(__name__)

Refs = Mapping[str, ArtifactRef]

CPU = "cpu"


class Listing:
    """Pass the listing of a source from the plan, which needs its digest, to the call that reads the images.

    At most one listing is held, in memory or in a temporary file, until it is taken; a pickled holder is empty.
    """

    def __init__(self) -> None:
        self._held: tuple[str, Source] | None = None

    def put(self, digest: str, source: "Source") -> None:
        """Hold a listing, replacing any other."""
        self._held = digest, source

    def take(self, digest: str) -> "Source | None":
        """Return the listing if it has this digest, else None; none is held afterwards."""
        held, self._held = self._held, None
        return held[1] if held is not None and held[0] == digest else None

    def drop(self) -> None:
        """Discard the listing: nobody will read the images."""
        self._held = None

    def __reduce__(self) -> tuple[type["Listing"], tuple[()]]:
        return Listing, ()


class StageJob(NamedTuple):
    """One run of a recipe: its source, its store, and the number of workers and ranks."""

    recipe: Recipe
    store: Store
    source: str
    workers: WorkerOptions
    run: str = ""
    ranks: RankCount = ONE
    listing: Listing | None = None  # shared by the parts of an attempt; without it each lists the source itself
    anew: bool = False  # discard shards that were begun on another kind of device
    images: str | None = None  # the content digest that its images must have
    stages: frozenset[str] = frozenset()  # of the run, which its images must be enough for

    @classmethod
    def of(cls, request: RunRequest, run: str = "", *, listing: Listing | None = None) -> "StageJob":
        """Return the job that a request asks for."""
        options = request.options
        store = Store(request.store)
        given = request.ranks, listing, request.anew, request.images
        return cls(request.recipe, store, request.source, options, run, *given)

    @property
    def device(self) -> str:
        """The device that its stages compute on: "cpu" or "cuda"."""
        from infra.compute.device import default_device

        chosen = self.recipe.compute.device
        return default_device() if chosen == "auto" else chosen

    def settled(self) -> "StageJob":
        """Return the job with "auto" settings resolved for its device; on a cluster they are resolved before this."""
        recipe = self.recipe.on(self.device)
        return self if recipe == self.recipe else self._replace(recipe=recipe)


class Result(NamedTuple):
    """The result of a stage's library call: the files that it wrote into its folder, counts and metrics."""

    files: list[FileEntry]
    counts: dict[str, int]
    metrics: dict[str, float]
    content_digest: str | None = None
    pages: Sequence[Page] = ()  # if the stage has written pages of shards itself


@dataclass(frozen=True)
class Work:
    """Everything that one stage's call may use."""

    job: StageJob
    plan: ArtifactPlan
    out: Store
    progress: Progress
    ranks: Ranks = ALONE
    _loaded: dict[str, Artifact] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def recipe(self) -> Recipe:
        """The run's recipe, resolved for its device."""
        return self.job.settled().recipe

    def input(self, name: str) -> Artifact:
        """Load the input called `name`; its manifest is read once.

        Raises:
            ValueError: it is not in the store, or its manifest is damaged or rejected.
        """
        if name not in self._loaded:
            self._loaded[name] = Artifact.load(self.job.store, self.ref(name))
        return self._loaded[name]

    def ref(self, name: str) -> ArtifactRef:
        """Return the reference to the input called `name`."""
        return self.plan.inputs[name]


def _none(_: Recipe) -> Collection[str]:
    return ()


class Stage(NamedTuple):
    """A named step of the pipeline, which makes one kind of artifact."""

    name: str
    kind: str
    version: int  # raised by hand when the same config gives another artifact
    what: Callable[[StageJob], dict[str, JsonValue]]  # the config that identifies the artifact
    call: Callable[[Work], Result]
    is_trained: bool = False  # by as many ranks as the job has
    is_measured: bool = False  # by one process, placed on a GPU if the job has any
    accept: Callable[[StageJob, Manifest], None] | None = None  # rejects an artifact that fails this job's checks
    needs: Mapping[str, str] = {}  # name of an input: stage that makes it
    unneeded: Callable[[Recipe], Collection[str]] = _none  # inputs that a recipe does without

    def inputs(self, recipe: Recipe) -> dict[str, str]:
        """Return the inputs that a recipe needs, each with the stage that makes it."""
        left_out = self.unneeded(recipe)
        return {name: of for name, of in self.needs.items() if name not in left_out}


class Graph(dict[str, Stage]):
    """Stages by name, in an order in which each comes after those that it needs."""

    def __init__(self, *stages: Stage) -> None:
        super().__init__()
        for stage in stages:
            missing = [of for of in stage.needs.values() if of not in self]
            assert not missing, f"{stage.name} needs {', '.join(missing)}, which must come before it"
            self[stage.name] = stage

    def order(self, recipe: Recipe, *, last: str | None = None, given: Collection[str] = ()) -> list[Stage]:
        """Return the stages that a run makes, in order.

        Args:
            recipe: decides which inputs stages do without, and so which stages nobody needs.
            last: the stage that the run is for; None for all that no other stage needs.
            given: stages whose artifacts are there already.
        """
        needed = {of for stage in self.values() for of in stage.needs.values()}
        wanted = set(self) - needed if last is None else {last}
        for name in reversed(self):
            if name in wanted:
                wanted |= set(self[name].inputs(recipe).values()) - set(given)
        return [stage for name, stage in self.items() if name in wanted]


def plan_of(stage: Stage, job: StageJob, inputs: Refs) -> ArtifactPlan:
    """Return the plan that identifies the artifact which `stage` makes of `inputs`."""
    job = job.settled()
    return ArtifactPlan(kind=stage.kind, version=stage.version, config=stage.what(job), inputs=dict(inputs))


def planned_ref(job: StageJob, plan: ArtifactPlan) -> ArtifactRef:
    """Refer to an artifact that is still to be made."""
    return ArtifactRef(kind=plan.kind, digest=plan.digest, uri=folder_of(job.store, plan.kind, plan.digest).uri)


def shards(job: StageJob) -> JsonValue:
    """Return the numbers of image shards: they decide which files the images make, and the order of streaming."""
    return [job.recipe.data.num_shards, job.recipe.data.num_val_shards]


def seeded(job: StageJob) -> dict[str, JsonValue]:
    """Return the settings that decide a stage's random numbers and the rounding of its sums."""
    return {"seed": job.recipe.seed, "threads": job.recipe.threads}


def computed(compute: ComputeConfig) -> dict[str, JsonValue]:
    """Return the settings that decide rounding on a GPU; none on CPUs, whose digests stay as they always were."""
    return {} if compute.device == CPU else {"compute": compute.as_json()}


def worker_facts(compute: ComputeConfig, options: WorkerOptions) -> dict[str, str]:
    """Return the facts of the device that workers compute on; asks a worker if this process may differ."""
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
    """Delete an artifact's unfinished shards if they were begun on another kind of device than the workers'."""
    begun = shards_begun_on(out)
    if begun is None or begun == (own := decisive(worker_facts(compute, options))):
        return
    log.warning("%s was begun on %s; it is made anew on %s", out.uri, describe_kind(begun), describe_kind(own))
    out.delete_tree()


def training_run(work: Work) -> "TrainingRun":
    """Return the folder, seed, device and ranks that a training runs with."""
    from infra.training.loop import TrainingRun

    recipe = work.recipe
    device, numerics = work.job.device, recipe.compute.numerics
    return TrainingRun(work.out, recipe.seed, recipe.threads, device, work.progress, work.ranks, numerics)
