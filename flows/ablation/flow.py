"""The flow that trains one recipe in several ways, with several seeds, and prints what came out."""

import logging
from collections.abc import Mapping
from typing import Annotated

import httpx
from prefect import flow, tags
from prefect.artifacts import create_markdown_artifact
from pydantic import Field, JsonValue

from flows.ablation.arm import ABLATION_ARM
from flows.pipeline import tasks
from flows.pipeline.graph import PREPARE
from flows.pipeline.tasks import Run
from flows.recipes.ablations import Ablation, ResolvedArm
from flows.runs.journal import Journal, RunRecord, StageRecord, State, start_journal
from flows.stage import Job, Listing, Result, Stage, Work
from infra.artifacts.manifest import ArtifactRef, manifest_of
from infra.artifacts.shards import put
from infra.compute.cluster import session
from infra.compute.workers import WorkerOptions
from infra.settings import Settings
from infra.store.store import Store

log = logging.getLogger(__name__)

Outcomes = Mapping[tuple[str, int], ArtifactRef]


@flow(name="ablation", flow_run_name="{run}", persist_result=False)
def ablation(
    plan: Annotated[Ablation, Field(description="arms and seeds")],
    *,
    run: Annotated[str, Field(description="name of this run, unique in the store")],
    store: Annotated[str, Field(description="folder or s3://bucket/prefix that artifacts are kept in")],
    source: Annotated[str, Field(description="images: a folder, or the name of a built-in source")],
    workers: Annotated[int, Field(ge=0, description="Ray workers; 0 does everything in one process")] = 2,
    gpus_per_worker: Annotated[float, Field(ge=0, description="GPUs a worker; 0.5 lets two share one")] = 0.0,
    ranks: Annotated[int, Field(ge=1, description="training processes, which share a step's micro-batches")] = 1,
) -> RunRecord:
    """Train and judge every arm with every seed, as far as that is not done yet, then write the page."""
    place, base = Store(store), plan.base
    options = WorkerOptions(workers=workers, gpus_per_worker=gpus_per_worker)
    journal = start_journal(base, store=place, source=source, run=run, workers=workers)
    this = Run(Job(base, place, source, options, run, ranks, Listing()), journal)
    with journal.kept(), session(Settings().ray_address, max(workers, ranks)):
        images = tasks.run_task(PREPARE, this, {})
        made = {(arm.name, seed): _arm(this, arm, seed, images) for seed in plan.seeds for arm in plan.arms}
        inputs = {f"{arm}, seed {seed}": ref for (arm, seed), ref in made.items()}
        report = tasks.run_task(report_stage(plan, made), this, inputs)
        journal.publish_report(manifest_of(place, report), report)
    _show_in_prefect(place, plan, report)
    return journal.record


def _arm(whole: Run, arm: ResolvedArm, seed: int, images: ArtifactRef) -> ArtifactRef:
    """One arm with one seed; teacher and warming up are shared with the arms that have the same."""
    name = f"{arm.name}, seed {seed}"
    job = whole.job._replace(recipe=arm.recipe.model_copy(update={"seed": seed}))
    this = Run(job, _Part(whole.journal, name))
    with tags(arm.name, f"seed {seed}"):
        made = tasks.walk(this, last="align", given={"prepare": images})
        inputs = {name: made[of] for name, of in ABLATION_ARM.inputs(arm.recipe).items()}
        return tasks.run_task(ABLATION_ARM, this, inputs)


def report_stage(plan: Ablation, outcomes: Outcomes) -> Stage:
    """The stage that writes the page of these outcomes."""

    def what(_: Job) -> dict[str, JsonValue]:
        return {"ablation": plan.as_json()}

    def call(work: Work) -> Result:
        from flows.ablation.report import Facts, build_ablation_report, metrics
        from flows.ablation.results import read_results
        from flows.runs.journal import REPORT_FILES

        results = read_results(work.job.store, plan, outcomes)
        report = build_ablation_report(results, Facts(work.job.run, work.job.source))
        texts = zip(REPORT_FILES, (report.html, report.markdown, report.json), strict=True)
        files = [put(work.out, name, text.encode()) for name, text in texts]
        return Result(files, {"arms": len(plan.arms), "seeds": len(plan.seeds)}, metrics(results))

    return Stage("ablation_report", "ablation_report", 1, what, call)


class _Part(Journal):
    """The journal of a run, in which the stages of one arm and seed carry their names."""

    def __init__(self, whole: Journal, name: str) -> None:
        self._whole, self._name = whole, name

    def begin(self, stage: str) -> None:
        """Note that a stage starts, or starts again."""
        self._whole.begin(f"{self._name}: {stage}")

    def end(
        self, stage: str, state: State, *, ref: ArtifactRef | None = None, reason: str | None = None
    ) -> StageRecord:
        """Note how a stage ended."""
        return self._whole.end(f"{self._name}: {stage}", state, ref=ref, reason=reason)


def _show_in_prefect(store: Store, plan: Ablation, report: ArtifactRef) -> None:
    """The report as an artifact of the flow run; the run is over and well even if the server will not have it."""
    key = "".join(char if char.isascii() and char.isalnum() else "-" for char in plan.name.lower())
    text = store.at("artifacts", report.kind, report.digest).read("report.md").decode()
    try:
        create_markdown_artifact(text, key=f"report-{key.strip('-')}", description=plan.description)
    except httpx.HTTPError as error:
        log.warning("the report is not in Prefect: %s", error)
