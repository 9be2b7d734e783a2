"""The report stage: collect what the manifests behind an evaluation say, and write it as HTML, Markdown and JSON."""

from datetime import UTC, datetime
from typing import NamedTuple

from pydantic import JsonValue, ValidationError

from flows.evaluation.inputs import EVALUATION, PICTURES
from flows.evaluation.sweep import read_sweep
from flows.recipes.schema import Recipe
from flows.report.facts import fit_of, loss_curves, rate_of, rejects_of
from flows.report.figures import figures_of, training_of
from flows.report.render import build_report
from flows.results.health.rules import findings
from flows.results.types import EvaluationReport, ReportData, StageRow
from flows.runs.journal import REPORT_FILES
from flows.stage import Result, Work
from infra.artifacts.artifact import Artifact
from infra.artifacts.lineage import Lineage, lineage
from infra.artifacts.made_on import summary
from infra.artifacts.manifest import Manifest
from infra.artifacts.shards import put
from infra.store.store import Store

FILES = 20  # listed per artifact
STAGE_OF_INPUT = {
    "images": "prepare",
    "codes": "encode",
    "generator": "train_generator",
    "samples": "sample",
    "second_generator": "train_second_generator",
    "evaluation": "evaluate",
}


def write_pages(work: Work) -> Result:
    """Write the report as HTML, Markdown and JSON."""
    recipe = work.recipe
    run = RunInfo(work.job.run, recipe.name, recipe.description, work.job.source, recipe.as_json())
    report = build_report(report_data(work.input("evaluation"), run))
    texts = zip(REPORT_FILES, (report.html, report.markdown, report.json), strict=True)
    return Result([put(work.out, name, text.encode()) for name, text in texts], {}, {})


class RunInfo(NamedTuple):
    """Facts about a run that its manifests do not hold: name, recipe, source and config."""

    run: str
    recipe: str
    description: str
    source: str
    config: dict[str, JsonValue]


def report_data(evaluation: Artifact, run: RunInfo) -> ReportData:
    """Collect all that a page shows from the manifests behind an evaluation.

    Raises:
        ValueError: the evaluation was written by another version, or one of its inputs is not in the store.
    """
    store, manifest, folder = evaluation.store, evaluation.manifest, evaluation.folder
    made = _artifacts(store, "evaluation", lineage(store, manifest))
    if "prepare" not in made:
        raise ValueError(f"the images behind {evaluation} are not in {store.uri}: name their store")
    report, sweep, recipe = read_evaluation(evaluation), read_sweep(folder, manifest), _recipe(run.config)
    counts = made["prepare"].manifest.counts
    trainings = {
        stage: training
        for stage, artifact in made.items()
        if (training := training_of(stage, artifact, recipe, counts.get("val", 0)))
    }
    pictures = [file.path for file in manifest.files if file.path.startswith(PICTURES)]
    return ReportData(
        run_id=run.run,
        recipe=run.recipe,
        description=run.description,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        source=run.source,
        command=manifest.command,
        counts=counts,
        stages=tuple(_row(name, one.manifest) for name, one in made.items()),
        evaluation=report,
        sweep=sweep,
        images={path.removeprefix(PICTURES): folder.read(path) for path in pictures},
        losses=loss_curves(trainings),
        fit=fit_of(made["train_generator"].manifest) if "train_generator" in made else None,
        rejects=rejects_of(made["prepare"]),
        findings=findings(figures_of(trainings, report, sweep, recipe)),
        config=run.config,
        versions=manifest.versions,
        hardware=manifest.hardware,
        git_revision=manifest.git_revision,
    )


def read_evaluation(evaluation: Artifact) -> EvaluationReport:
    """Read the scores and galleries of an evaluation.

    Raises:
        ValueError: it was written by another version.
    """
    try:
        return EvaluationReport.model_validate_json(evaluation.folder.read(EVALUATION))
    except ValidationError as error:
        said = error.errors()[0]
        where = ".".join(map(str, said["loc"]))
        raise ValueError(f"{evaluation.uri}/{EVALUATION}: {where}: {said['msg']}; evaluate the run again") from error


def _recipe(config: dict[str, JsonValue]) -> Recipe | None:
    """Read a recipe; None if another version wrote it and this one cannot."""
    try:
        return Recipe.model_validate(config)
    except ValidationError:
        return None


def _artifacts(store: Store, name: str, tree: Lineage) -> dict[str, Artifact]:
    """Return the artifacts behind an input of this name by the stage that made them, each after its own inputs.

    Tokenizers name the stage in their config.
    """
    found: dict[str, Artifact] = {}
    for needed, below in tree.inputs.items():
        found |= _artifacts(store, needed, below)
    if tree.manifest is not None:
        stage = str(tree.manifest.config.get("stage", STAGE_OF_INPUT.get(name, tree.manifest.kind)))
        found.setdefault(stage, Artifact(store, tree.manifest))
    return found


def _row(name: str, manifest: Manifest) -> StageRow:
    return StageRow(
        name=name,
        state="Completed",
        seconds=manifest.seconds,
        digest=manifest.digest,
        inputs=tuple(ref.digest for ref in manifest.inputs.values()),
        rate=rate_of(manifest),
        made_on=summary(manifest.made_on),
        files=tuple(f"{e.path} · {e.size:,} bytes · {e.sha256}" for e in manifest.files[:FILES]),
    )
