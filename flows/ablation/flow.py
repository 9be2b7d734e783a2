"""The flow that trains one recipe in several ways, with several seeds, and compares the results on a page."""

import logging
from collections.abc import Mapping, Sequence
from typing import Annotated

import httpx
from prefect import flow, tags
from prefect.artifacts import create_markdown_artifact
from pydantic import Field, JsonValue

from flows.ablation.arm import ABLATION_ARM
from flows.pipeline import tasks
from flows.pipeline.graph import PREPARE
from flows.pipeline.tasks import RunContext
from flows.recipes.ablations import Ablation, ResolvedArm
from flows.results.types import Finding
from flows.runs.journal import Journal, RunRecord, StageRecord, State
from flows.runs.run_request import RunRequest
from flows.stage import Result, Stage, StageJob, Work
from infra.artifacts.manifest import ArtifactRef, manifest_of
from infra.artifacts.shards import put
from infra.compute.cluster import session
from infra.settings import Settings
from infra.store.store import Store

log = logging.getLogger(__name__)

Outcomes = Mapping[tuple[str, int], ArtifactRef]


@flow(name="ablation", flow_run_name="{run}", persist_result=False)
def ablation(
    request: Annotated[RunRequest, Field(description="what the run was asked for, its ablation among it")],
    run: Annotated[str, Field(description="name of this run, unique in the store")],
) -> RunRecord:
    """Train and judge every arm with every seed, as far as that is not cached, then write the page."""
    plan, this = request.ablation, RunContext.of(request, run)
    assert plan is not None
    store, journal = this.job.store, this.journal
    with journal.kept(), session(Settings().ray_address, request.processes):
        images = tasks.run_task(PREPARE, this, {})
        made = {(arm.name, seed): _arm(this, arm, seed, images) for seed in plan.seeds for arm in plan.arms}
        inputs = {f"{arm}, seed {seed}": ref for (arm, seed), ref in made.items()}
        report = tasks.run_task(report_stage(plan, made), this, inputs)
        journal.publish_report(manifest_of(store, report), report)
    _show_in_prefect(store, plan, report)
    return journal.record


def _arm(whole: RunContext, arm: ResolvedArm, seed: int, images: ArtifactRef) -> ArtifactRef:
    """Train and judge one arm with one seed; teacher and warming up are shared with the arms that have the same."""
    name = f"{arm.name}, seed {seed}"
    job = whole.job._replace(recipe=arm.recipe.model_copy(update={"seed": seed}))
    this = RunContext(job, _Part(whole.journal, name))
    with tags(arm.name, f"seed {seed}"):
        made = tasks.walk(this, last="align", given={"prepare": images})
        inputs = {name: made[of] for name, of in ABLATION_ARM.inputs(arm.recipe).items()}
        return tasks.run_task(ABLATION_ARM, this, inputs)


def report_stage(plan: Ablation, outcomes: Outcomes) -> Stage:
    """Return the stage that writes the page of these outcomes."""

    def what(_: StageJob) -> dict[str, JsonValue]:
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

    def note_findings(self, stage: str, findings: Sequence[Finding]) -> None:
        """Note what was found in the figures of a training."""
        name = f"{self._name}: {stage}"
        self._whole.note_findings(name, [one.model_copy(update={"stage": name}) for one in findings])


def _show_in_prefect(store: Store, plan: Ablation, report: ArtifactRef) -> None:
    """Show the report as an artifact of the flow run; a server that rejects it does not fail the run."""
    key = "".join(char if char.isascii() and char.isalnum() else "-" for char in plan.name.lower())
    text = store.at("artifacts", report.kind, report.digest).read("report.md").decode()
    try:
        create_markdown_artifact(text, key=f"report-{key.strip('-')}", description=plan.description)
    except httpx.HTTPError as error:
        log.warning("the report is not in Prefect: %s", error)
