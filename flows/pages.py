"""The report stage: what the manifests behind an evaluation say, as a page, as Markdown and as JSON."""

from datetime import UTC, datetime

from flows.evidence import EVALUATION, PICTURES
from flows.report import build_report
from flows.report_data import EvaluationReport, ReportData, StageRow
from flows.runs import REPORT_FILES
from flows.stage import Result, Work
from infra.artifacts import Lineage, Manifest, lineage, manifest_of, put

ORDER = ("prepare", "teacher", "warm_up", "align", "fine_tune", "encode", "train_generator", "sample", "evaluate")
STAGE_OF_KIND = {
    "images": "prepare",
    "codes": "encode",
    "generator": "train_generator",
    "samples": "sample",
    "evaluation": "evaluate",
}


def write_pages(work: Work) -> Result:
    """Write the report's three forms."""
    evaluation = manifest_of(work.job.store, work.ref("evaluation"))
    report = build_report(_data(work, evaluation))
    texts = zip(REPORT_FILES, (report.html, report.markdown, report.json), strict=True)
    return Result([put(work.out, name, text.encode()) for name, text in texts], {}, {})


def _data(work: Work, evaluation: Manifest) -> ReportData:
    folder, recipe = work.folder("evaluation"), work.recipe
    made = _manifests(lineage(work.job.store, evaluation))
    pictures = [file.path for file in evaluation.files if file.path.startswith(PICTURES)]
    return ReportData(
        run_id=work.job.run,
        recipe=recipe.name,
        description=recipe.description,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        source=work.job.source,
        command=evaluation.command,
        counts=made["prepare"].counts,
        stages=tuple(_row(name, made[name]) for name in ORDER if name in made),
        evaluation=EvaluationReport.model_validate_json(folder.read(EVALUATION)),
        images={path.removeprefix(PICTURES): folder.read(path) for path in pictures},
        config=recipe.as_json(),
        versions=evaluation.versions,
        hardware=evaluation.hardware,
        git_revision=evaluation.git_revision,
    )


def _manifests(tree: Lineage) -> dict[str, Manifest]:
    """The manifests behind an artifact, by the stage that made them."""
    found: dict[str, Manifest] = {}
    if tree.manifest is not None:
        found[stage_of(tree.manifest)] = tree.manifest
    for below in tree.inputs.values():
        found |= _manifests(below)
    return found


def stage_of(manifest: Manifest) -> str:
    """The stage that made an artifact; tokenizers name it in their config."""
    return str(manifest.config.get("stage", STAGE_OF_KIND.get(manifest.kind, manifest.kind)))


def _row(name: str, manifest: Manifest) -> StageRow:
    return StageRow(
        name=name,
        state="Completed",
        seconds=manifest.seconds,
        digest=manifest.digest,
        inputs=tuple(ref.digest for ref in manifest.inputs.values()),
    )
