"""Report a run against a baseline run: changes, the gate's verdict, and the page of all runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import JsonValue, ValidationError

from flows.report.history import HISTORY, history_page
from flows.report.pages import RunInfo, read_evaluation, report_data
from flows.report.render import Report, build_report
from flows.results.comparison import Comparison, GateResult, compare
from flows.results.gate import GateConfig, Threshold, judge
from flows.results.types import Finding
from flows.runs.history import PastRun, before, is_evaluated, latest, records, ref_of
from flows.runs.journal import REPORT_FILES
from infra.artifacts.artifact import Artifact
from infra.store.store import Store

PUBLISHED = "published"
RECONSTRUCTIONS = "reconstructions.png"


class ReportResult(NamedTuple):
    """The outcome of reporting a run, and the files written."""

    run: str
    against: str | None
    comparison: Comparison | None
    gate: GateResult | None
    files: tuple[str, ...]
    metrics: dict[str, float]
    findings: tuple[Finding, ...]
    picture: str | None
    """an image of reconstructions, if the tokenizer's training left one."""

    @property
    def is_passed(self) -> bool:
        """Return whether the run passed the gate; True if the gate was not run."""
        return self.gate is None or self.gate.passed

    def as_json(self) -> dict[str, JsonValue]:
        """Return one JSON object, for scripts."""
        rows = self.comparison.rows if self.comparison else ()
        return {
            "run": self.run,
            "against": self.against,
            "metrics": dict(self.metrics),
            "changes": {row.name: row.change for row in rows if not row.why_not},
            "verdicts": {row.name: "not comparable" if row.why_not else row.verdict for row in rows},
            "gate": self.gate.as_json() if self.gate else None,
            "findings": [one.as_json() for one in self.findings],
            "files": list(self.files),
        }


def choose(found: Sequence[PastRun], run: str | None) -> PastRun:
    """Choose the run to report: the named one, or the last that was evaluated.

    Raises:
        ValueError: there is none, or it was not evaluated.
    """
    if run is None:
        chosen = latest(found)
        if chosen is None:
            raise ValueError("no run of this store was evaluated: `sftok run` makes one")
        return chosen
    chosen = next((one for one in found if one.run == run), None)
    if chosen is None:
        there = ", ".join(one.run for one in found[-5:]) or "none"
        raise ValueError(f"there is no run {run!r}; the last ones are: {there}")
    if not is_evaluated(chosen):
        raise ValueError(
            f"run {run} is {chosen.state} and was not evaluated: run its recipe again, it resumes from there"
        )
    return chosen


def write_report(
    store: Store, *, run: str | None, against: str | None, out: str | None, gate: GateConfig | None
) -> ReportResult:
    """Write the report of a run as a page, Markdown and JSON, and the page of all runs beside it.

    Args:
        store: whose runs these are.
        run: the run; None for the last one that was evaluated.
        against: another run, or "published" for the published figures alone; None for the last good run of the same
            recipe before it, if there is one.
        out: a local folder; None writes into `runs/{run}` and the page of all runs into the store's root.
        gate: thresholds to check the run against; None does not run the gate.

    Raises:
        ValueError: a run is missing, was not evaluated or was written by another version; the folder cannot be written.
    """
    found = records(store)
    chosen = choose(found, run)
    other = _other(found, chosen, against)
    evaluation = _evaluation(store, chosen)
    now = read_evaluation(evaluation)
    comparison = judged = None
    if other is not None:
        theirs = _evaluation(store, other)
        comparison = compare(
            chosen.run,
            now,
            other.run,
            read_evaluation(theirs),
            same_images=_images(evaluation) == _images(theirs),
        )
        judged = judge(comparison, gate).result(other.run) if gate is not None else None
    data = report_data(evaluation, run_info(chosen))
    data = data.model_copy(update={"comparison": comparison, "gate": judged})
    files = _write(store, chosen, build_report(data), found, out)
    against_run = other.run if other else None
    metrics, picture = now.metrics(), _picture(evaluation)
    return ReportResult(chosen.run, against_run, comparison, judged, files, metrics, data.findings, picture)


def gate_of(store: Store, run: str | None, thresholds: Sequence[str]) -> GateConfig:
    """Return the thresholds for a run: METRIC=LOSS of the command line, else its recipe's gate.

    Raises:
        ValueError: a threshold cannot be parsed, or there is none at all.
    """
    if thresholds:
        for text in thresholds:
            Threshold.parse(text)
        return GateConfig(thresholds=tuple(thresholds))
    chosen = choose(records(store), run)
    try:
        config = GateConfig.model_validate(chosen.recipe.model_dump().get("gate") or {})
    except ValidationError as error:
        raise ValueError(f"the gate of run {chosen.run} cannot be read: {error.errors()[0]['msg']}") from error
    if not config.thresholds:
        raise ValueError(
            f"recipe {chosen.recipe.name} has no gate: give --threshold METRIC=LOSS, or set gate.thresholds"
        )
    return config


def run_info(run: PastRun) -> RunInfo:
    """Return the facts of a past run."""
    config = run.recipe.model_dump(mode="json")
    return RunInfo(run.run, run.recipe.name, str(config.get("description", "")), run.source, config)


def _other(found: Sequence[PastRun], chosen: PastRun, against: str | None) -> PastRun | None:
    if against == PUBLISHED:
        return None
    return before(found, chosen) if against is None else choose(found, against)


def _evaluation(store: Store, run: PastRun) -> Artifact:
    ref = ref_of(run, "evaluate")
    assert ref is not None, "`choose` rejects runs without an evaluation"
    return Artifact.load(store, ref)


def _picture(evaluation: Artifact) -> str | None:
    store, ref = evaluation.store, evaluation.inputs.get("tokenizer")
    name = f"artifacts/{ref}/{RECONSTRUCTIONS}" if ref else ""
    return f"{store.uri}/{name}" if name and store.exists(name) else None


def _images(evaluation: Artifact) -> str | None:
    ref = evaluation.inputs.get("images")
    return ref.content_id if ref else None


def _write(store: Store, run: PastRun, report: Report, found: Sequence[PastRun], out: str | None) -> tuple[str, ...]:
    texts = dict(zip(REPORT_FILES, (report.html, report.markdown, report.json), strict=True))
    if out is None:
        folder = store.at("runs", run.run)
        for name, text in texts.items():
            folder.write(name, text.encode())
        store.write(HISTORY, history_page(store.uri, found).encode())
        return (*(f"{folder.uri}/{name}" for name in texts), f"{store.uri}/{HISTORY}")
    place = Path(out).expanduser()
    try:
        place.mkdir(parents=True, exist_ok=True)
        texts[HISTORY] = history_page(store.uri, found, beside=str(place.resolve()))
        for name, text in texts.items():
            (place / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{place} cannot be written ({error.strerror or error}): name another folder") from error
    return tuple(str(place / name) for name in texts)
