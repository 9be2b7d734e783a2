"""Judge a training by the rules of `flows.results.health.rules`: while its figures come, and when it has ended."""

import functools
import logging
from collections.abc import Mapping

from flows.report.figures import seen_at_best, training_of
from flows.results.health.figures import Figures, Training
from flows.results.health.rules import SETTINGS, findings
from flows.runs.journal import Journal
from flows.stage import Refs, Stage, StageJob
from infra.artifacts.artifact import Artifact
from infra.artifacts.manifest import manifest_of

log = logging.getLogger(__name__)


class Watch:
    """Listener to the progress of a stage; what it finds is noted in the journal, and said once in the log."""

    def __init__(self, stage: Stage, job: StageJob, inputs: Refs, journal: Journal) -> None:
        self._stage, self._recipe, self._journal = stage.name, job.recipe, journal
        self._store, self._images = job.store, inputs.get("images")
        self._lines: list[dict[str, float]] = []
        self._said: set[str] = set()

    def __call__(self, done: int, total: int, figures: Mapping[str, float]) -> None:
        """Take the figures of a step; validations are judged at once."""
        if self._stage not in SETTINGS:
            return
        self._lines.append({**figures, "step": float(done)})
        if any(name.startswith("val_") for name in figures):
            at_best = seen_at_best(self._stage, self._recipe, self._held_out)
            self._judge(Training(lines=tuple(self._lines), steps=total, reachable=at_best), done=done / total)

    def end(self, artifact: Artifact, *, is_new: bool) -> None:
        """Judge the whole training; what is found in one of an earlier run is noted, but not said."""
        if self._stage not in SETTINGS:
            return
        training = training_of(self._stage, artifact, self._recipe, self._held_out)
        if training is not None:
            self._judge(training, is_said=is_new)

    @functools.cached_property
    def _held_out(self) -> int:
        return manifest_of(self._store, self._images).counts["val"] if self._images else 0

    def _judge(self, training: Training, *, done: float | None = None, is_said: bool = True) -> None:
        size = self._recipe.tokenizer.codebook_size
        found = findings(Figures(trainings={self._stage: training}, codebook_size=size), done=done)
        if found or done is None:
            self._journal.note_findings(self._stage, found)
        for finding in found:
            if is_said and finding.rule not in self._said:
                log.warning("%s", finding)
            self._said.add(finding.rule)
