"""Trainings are judged while they go on and when they end; a finding is said once, and noted in the run's record."""

import json
import logging
from pathlib import Path

import pytest

from flows.make import make
from flows.pipeline import graph
from flows.pipeline.watch import Watch
from flows.runs.journal import Journal, RunRecord, start_journal
from flows.runs.run_request import RunRequest
from infra.artifacts.manifest import ArtifactRef
from infra.store.store import Store
from tests.support.small_codes import TINY, TOKENIZER, codes, names
from tests.support.small_dataset import Made, draw_images

# Enough to learn 24 rows of random codes by heart, which says nothing about the held-out ones.
SETTINGS = [*TINY, "generator.width=32", "train_generator.steps=120", "train_generator.validate_every=30"]
SETTINGS += ["train_generator.optimizer.lr=0.01", "train_generator.log_every=10", "threads=1"]
OVER_FITTED = "train_generator over-fits: the loss fell, but val_nll of held-out images was best at step"


@pytest.fixture
def random_codes(store: Store, tmp_path: Path) -> tuple[Made, ArtifactRef]:
    made = Made(store, tmp_path, *SETTINGS)
    return made, codes(made, names(TOKENIZER, TOKENIZER, TOKENIZER))


def journal_of(made: Made, run: str) -> Journal:
    return start_journal(RunRequest(recipe=made.job.recipe, store=made.store.uri, source="noise"), run)


def test_a_generator_that_learns_by_heart_is_told(
    random_codes: tuple[Made, ArtifactRef], caplog: pytest.LogCaptureFixture
) -> None:
    made, ref = random_codes
    journal, stage = journal_of(made, "first"), graph.TRAIN_GENERATOR
    watch = Watch(stage, made.job, {"codes": ref}, journal)
    with caplog.at_level(logging.WARNING, "flows"):
        artifact, state = make(stage, made.job, {"codes": ref}, progress=watch)
        while_it_trained = [one.rule for one in journal.record.findings or ()]
        watch.end(artifact, is_new=state == "Completed")
    assert while_it_trained == ["over-fitting"]
    said = [record.getMessage() for record in caplog.records]
    assert sum(text.startswith(OVER_FITTED) for text in said) == 1, "said more than once"
    record = RunRecord.model_validate_json(made.store.read("runs/first/run.json"))
    rules = [one.rule for one in record.findings or ()]
    assert {"over-fitting", "generator-blind"} <= set(rules)
    assert len(rules) == len(set(rules)) == len(said)

    caplog.clear()
    journal = journal_of(made, "second")
    watch = Watch(stage, made.job, {"codes": ref}, journal)
    artifact, state = make(stage, made.job, {"codes": ref}, progress=watch)
    watch.end(artifact, is_new=state == "Completed")
    assert state == "Cached"
    assert [one.rule for one in journal.record.findings or ()] == rules
    assert not caplog.records


def test_a_collapsed_codebook_is_told_from_half_of_the_steps_on(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    draw_images(store.path / "images")
    made = Made(store, Path(store.path / "images"))
    images, journal = made.run(graph.PREPARE), journal_of(made, "run")
    watch = Watch(graph.WARM_UP, made.job, {"images": images}, journal)
    collapsed = {"loss": 2.0, "val_code_usage": 0.05}
    watch(40, 100, collapsed)
    watch(60, 100, {"loss": 2.0})
    assert journal.record.findings is None
    watch(80, 100, collapsed)
    watch(100, 100, collapsed)
    (finding,) = journal.record.findings or ()
    assert (finding.rule, finding.stage) == ("codebook", "warm_up")
    assert finding.remedies[0] == "train the tokenizer longer with `--set warm_up.training.steps=400`"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert json.loads(store.read("runs/run/run.json"))["findings"][0]["rule"] == "codebook"


def test_other_stages_are_not_judged(store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = Made(store, tmp_path)
    journal = journal_of(made, "run")
    watch = Watch(graph.ENCODE, made.job, {}, journal)
    watch(1, 2, {"val_code_usage": 0.0})
    assert journal.record.findings is None
    assert not caplog.records
