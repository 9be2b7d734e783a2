"""The record of a run in the store: `runs/{run}/run.json`, rewritten whenever a stage ends."""

import contextlib
import json
import logging
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Literal

import psutil
from pydantic import ConfigDict, Field, JsonValue, ValidationError

from flows.results.types import Finding
from flows.runs.history import records
from flows.runs.run_request import RunRequest
from infra.artifacts.manifest import DIGEST_CHARS, ArtifactRef, Manifest
from infra.config import Config
from infra.store.store import Store

State = Literal["Running", "Completed", "Cached", "Failed", "Cancelled", "Crashed"]

SHOWN_CHARS = 12  # of a digest's 32, in tables that have to fit a terminal
REPORT_FILES = ("report.html", "report.md", DATA := "report.json")

log = logging.getLogger(__name__)


class StageRecord(Config):
    """The state of one stage of a run."""

    state: State
    seconds: float = Field(0.0, description="since its first attempt began, waiting for retries included")
    ref: ArtifactRef | None = Field(None, description="what it published, or found published")
    reason: str | None = Field(None, description="why it failed")


class Writer(Config):
    """The process that executes a run, recorded so that others can tell whether it is alive."""

    host: str
    pid: int
    began: float = Field(description="when the process began, in seconds since 1970: a number is used again")


class RunRecord(RunRequest):
    """Everything there is to know about a run: what was asked for, and what became of it.

    Records of earlier versions hold less of the request; what they lack has its default.
    """

    model_config = ConfigDict(ser_json_inf_nan="strings")  # the best possible PSNR is infinite; JSON has no word for it

    schema_version: Literal[1] = 1
    run: str
    state: State = "Running"
    started_at: str = Field(description="UTC, ISO 8601")
    seconds: float = 0.0
    stages: dict[str, StageRecord] = Field(default_factory=dict)
    metrics: dict[str, float] = Field(default_factory=dict)
    report: str | None = Field(None, description="URI of the report page")
    findings: tuple[Finding, ...] | None = Field(
        None, description="what to look at first, serious findings before minor ones; None: nothing was judged"
    )
    gate: Literal["passed", "failed"] | None = Field(None, description="what the regression gate said, if it was asked")
    reason: str | None = None
    writer: Writer | None = Field(None, description="the process that writes this; None in records of before")

    @property
    def is_partial_of_before(self) -> bool:
        """Whether it is a run of some stages alone whose record, of an earlier version, does not say so."""
        if self.last is not None or self.ablation is not None or not self.stages:
            return False
        return self.recipe.name == "retokenize" or next(iter(self.stages)) != "prepare" or ":" in "".join(self.stages)

    @property
    def request(self) -> RunRequest:
        """What was asked for."""
        return RunRequest(**{name: getattr(self, name) for name in RunRequest.model_fields})


class StageFailedError(RuntimeError):
    """A stage failed for good; the cause is the exception's."""

    def __init__(self, stage: str, reason: str, record: RunRecord) -> None:
        super().__init__(f"{stage}: {reason}")
        self.stage = stage
        self.reason = reason
        self.record = record


def new_run_id(recipe: str) -> str:
    """Make a name such as 20261123-224455-digits-3f2a, which sorts by time and does not collide."""
    name = re.sub(r"[^a-z0-9_]+", "-", recipe.lower()).strip("-") or "run"
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{name}-{secrets.token_hex(2)}"


class Journal:
    """Writes the record of a run as it goes on."""

    def __init__(self, store: Store, record: RunRecord) -> None:
        self.record = record
        self._store = store
        self._folder = store.at("runs", record.run)
        self._began = time.monotonic()
        self._stage_began: dict[str, float] = {}

    def begin(self, stage: str) -> None:
        """Note that a stage starts, or starts again."""
        self._stage_began.setdefault(stage, time.monotonic())
        self._note(stage, StageRecord(state="Running"))

    def end(
        self, stage: str, state: State, *, ref: ArtifactRef | None = None, reason: str | None = None
    ) -> StageRecord:
        """Note how a stage ended."""
        seconds = round(time.monotonic() - self._stage_began[stage], 3)
        return self._note(stage, StageRecord(state=state, seconds=seconds, ref=ref, reason=reason))

    def note_findings(self, stage: str, findings: Sequence[Finding]) -> None:
        """Note what was found in the figures of a training, in place of what was found in it before."""
        others = [one for one in self.record.findings or () if one.stage != stage]
        self._update(findings=(*others, *findings))

    def publish_report(self, evaluation: Manifest, report: ArtifactRef, *, is_judged: bool = False) -> None:
        """Copy the report beside the record, and take over the metrics and, if it has any, the findings."""
        source, changes = self._store.at("artifacts", report.kind, report.digest), {}
        for name in REPORT_FILES:
            if source.exists(name):
                self._folder.write(name, source.read(name))
        if is_judged and source.exists(DATA):
            findings = json.loads(source.read(DATA)).get("findings")  # pages of earlier versions have none
            changes["findings"] = None if findings is None else tuple(map(Finding.model_validate, findings))
        self._update(metrics=evaluation.metrics, report=f"{self._folder.uri}/{REPORT_FILES[0]}", **changes)

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Write the record's beginning and, whatever happens in the block, its end; name the stage that failed."""
        self._write()
        try:
            yield
        except Exception as error:
            stage, reason = self._blame(error)
            self._close("Failed", reason=f"{stage}: {reason}")
            raise StageFailedError(stage, reason, self.record) from error
        except BaseException:  # Ctrl-C, SIGTERM: somebody wanted it to end
            self._close("Cancelled")
            raise
        self._close("Completed")

    def _blame(self, error: Exception) -> tuple[str, str]:
        failed = [name for name, stage in self.record.stages.items() if stage.state == "Failed"]
        return (failed[-1] if failed else "run"), one_line(error)

    def _close(self, state: State, reason: str | None = None) -> None:
        stages: dict[str, StageRecord] = {
            name: stage.model_copy(update={"state": state}) if stage.state == "Running" else stage
            for name, stage in self.record.stages.items()
        }
        try:
            self._update(state=state, reason=reason, stages=stages)
        except OSError as error:  # the store may be the very thing that failed
            if state == "Completed":
                raise
            log.warning("the record of run %s could not be written: %s", self.record.run, one_line(error))

    def _note(self, stage: str, record: StageRecord) -> StageRecord:
        self._update(stages={**self.record.stages, stage: record})
        return record

    def _update(self, **changes: object) -> None:
        seconds = round(time.monotonic() - self._began, 3)
        self.record = self.record.model_copy(update={**changes, "seconds": seconds})
        self._write()

    def _write(self) -> None:
        self._folder.write("run.json", self.record.model_dump_json(indent=2).encode())


def start_journal(request: RunRequest, run: str) -> Journal:
    """Return the journal of a run that begins now."""
    asked = {name: getattr(request, name) for name in RunRequest.model_fields}
    record = RunRecord(**asked, run=run, started_at=datetime.now(UTC).isoformat(), writer=this_process())
    return Journal(Store(request.store), record)


def read_record(store: Store, run: str) -> RunRecord:
    """Read the record of a run, to resume or repeat it.

    Raises:
        ValueError: there is no such run, or another version wrote its record and this one cannot read it.
    """
    (_,) = records(store, [run])
    try:
        return RunRecord.model_validate_json(store.read(f"runs/{run}/run.json"))
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise ValueError(
            f"run {run} was written by another version ({where} differs) and cannot be resumed; run its recipe again"
        ) from error


def find_record(text: str, store: str | None) -> RunRecord | None:
    """Read the record of the run that `text` names, in the given store or the default one; None if it is no run.

    Raises:
        ValueError: another version wrote the record.
    """
    place = Store.usual(store)
    is_run = "/" not in text and place.exists(f"runs/{text}/run.json")
    return read_record(place, text) if is_run else None


def this_process() -> Writer:
    """Describe this process, as the writer of a record."""
    return Writer(host=socket.gethostname(), pid=os.getpid(), began=psutil.Process().create_time())


def one_line(error: BaseException, *, limit: int = 500) -> str:
    """Format an error as one line, with its type where the text alone would not say what it is."""
    text = " ".join(str(error).split())
    if not isinstance(error, ValueError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def stage_rows(record: RunRecord) -> Sequence[tuple[str, str, str, str]]:
    """Return the stages as rows of a table: name, state, seconds, artifact (as much as `sftok show` needs)."""
    return [
        (name, stage.state, f"{stage.seconds:.1f}", str(stage.ref)[: -DIGEST_CHARS + SHOWN_CHARS] if stage.ref else "")
        for name, stage in record.stages.items()
    ]


def stages_as_json(record: RunRecord) -> dict[str, dict[str, JsonValue]]:
    """Return state, artifact and seconds of each stage, as commands print them in JSON."""
    return {
        name: {
            "state": stage.state,
            "digest": stage.ref.digest if stage.ref else None,
            "uri": stage.ref.uri if stage.ref else None,
            "seconds": stage.seconds,
        }
        for name, stage in record.stages.items()
    }
