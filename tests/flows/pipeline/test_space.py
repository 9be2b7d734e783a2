"""A disk that is too small is refused before anything is trained; what is made already is not asked for again."""

import re
from typing import NamedTuple

import pytest

from flows.pipeline.space import CHECKPOINT, Sizes
from flows.recipes.files import load_recipe
from flows.runs.journal import StageFailedError


class Usage(NamedTuple):
    free: int


@pytest.fixture
def free(monkeypatch):
    """Set the bytes that are free on every disk."""
    return lambda number: monkeypatch.setattr("flows.pipeline.space.shutil.disk_usage", lambda _: Usage(number))


def test_a_full_disk_is_refused_before_training_and_the_run_goes_on_when_there_is_room(run_pipeline, fakes, free):
    free(100)
    with pytest.raises(StageFailedError) as caught:
        run_pipeline("full")
    assert list(fakes.attempts) == ["prepare"], "the fake does not ask for the images' own room"
    needed = re.search(
        r"has 100 bytes free, and the run needs ([\d.]+) MB: free some, or choose another --store", str(caught.value)
    )
    assert needed is not None
    free(int(1.1e6 * float(needed[1])))
    assert run_pipeline("roomy").state == "Completed"
    free(0)
    record = run_pipeline("again")
    assert {stage.state for stage in record.stages.values()} == {"Cached"}


def test_checkpoints_are_those_of_the_largest_training():
    sizes = Sizes.of(recipe := load_recipe("digits"), 1797, 10)
    of = sizes.artifacts
    stages = ("teacher", "align", "train_generator")
    largest = CHECKPOINT * 2 * max(of[stage] for stage in stages)
    assert sizes.total(stages) == sum(of[stage] for stage in stages) + largest
    assert sizes.total(("encode",)) == of["encode"]
    assert Sizes.of(recipe, None).artifacts["encode"] is None
    assert Sizes.of(recipe, 2 * 1797).artifacts["encode"] == pytest.approx(2 * of["encode"], abs=1)


def test_an_imported_teacher_has_no_checkpoints():
    assert "teacher" not in Sizes.of(load_recipe("imagenet256_sftok_b"), None).checkpoints


def test_what_a_stopped_stage_has_written_is_not_asked_for_again(run_pipeline, fakes, free, store):
    run_pipeline("whole")
    codes = next(store.path.glob("artifacts/codes/*"))
    (codes / "manifest.json").unlink()
    free(1000)
    with pytest.raises(StageFailedError, match="the run needs"):
        run_pipeline("refused")
    (codes / "val-00000.parquet").write_bytes(bytes(1_000_000))
    assert run_pipeline("resumed").stages["encode"].state == "Completed"
