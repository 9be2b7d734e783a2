"""The flow: all stages in order, a record of the run, artifacts in Prefect, and only what changed is made again."""

import json
import math

import pytest

from flows.recipes.files import load_recipe
from flows.runs.journal import RunRecord, StageFailedError, new_run_id
from infra.artifacts.lineage import resolve
from infra.artifacts.manifest import verify
from infra.store.store import Store
from tests.support.fake_stages import FINDING

STAGES = ["prepare", "teacher", "warm_up", "align", "fine_tune", "encode"]
STAGES += ["train_generator", "sample", "train_second_generator", "evaluate", "report"]


def test_run_publishes_every_stage_and_its_record(run_pipeline, store):
    returned = run_pipeline("whole")
    record = RunRecord.model_validate_json(store.read("runs/whole/run.json"))
    assert record == returned
    assert list(record.stages) == STAGES
    assert record.state == "Completed"
    assert record.recipe == load_recipe("digits")
    assert record.findings == (FINDING,)
    assert record.metrics == {"accuracy": 0.93, "psnr_of_a_copy": math.inf}
    for stage in record.stages.values():
        verify(store, resolve(store, str(stage.ref)))
    assert record.report == f"{store.uri}/runs/whole/report.html"
    assert store.read("runs/whole/report.html") == b"<h1>digits</h1>"


def test_prefect_shows_report_and_progress(run_pipeline):
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName

    run_pipeline("shown")
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(flow_run_filter=FlowRunFilter(name=FlowRunFilterName(any_=["shown"])))
    by_key = {artifact.key: artifact for artifact in found}
    assert by_key["report-digits-text"].data == "# digits"
    assert by_key["report-digits-page"].type == "markdown"  # Prefect's links are Markdown
    assert "report.html" in by_key["report-digits-page"].data
    assert [row["stage"] for row in json.loads(by_key["report-digits-stages"].data)] == STAGES
    (found,) = json.loads(by_key["report-digits-findings"].data)
    assert found == {"finding": FINDING.sentence, "figures": "samples 31 %", "try": "train on more images"}
    assert by_key["progress-train-generator"].type == "progress"
    assert by_key["progress-train-generator"].data == 100


def test_only_what_changed_is_made_again(run_pipeline, fakes):
    first = run_pipeline("unchanged")
    second = run_pipeline("changed", "train_generator.steps=7")
    made = [name for name, stage in second.stages.items() if stage.state == "Completed"]
    assert made == ["train_generator", "sample", "evaluate", "report"]
    assert {second.stages[name].state for name in set(STAGES) - set(made)} == {"Cached"}
    assert second.stages["sample"].ref != first.stages["sample"].ref


def test_failure_is_written_down_and_the_next_run_goes_on(run_pipeline, fakes, store):
    fakes.failures["align"] = [ValueError("no such\nthing")]
    with pytest.raises(StageFailedError) as caught:
        run_pipeline("broken")
    record = RunRecord.model_validate_json(store.read("runs/broken/run.json"))
    assert (record.state, record.reason) == ("Failed", "align: no such thing")
    assert caught.value.record == record
    assert [stage.state for stage in record.stages.values()] == ["Completed"] * 3 + ["Failed"]
    mended = run_pipeline("mended")
    assert [stage.state for stage in mended.stages.values()] == ["Cached"] * 3 + ["Completed"] * 8


def test_run_ids_sort_and_are_plain():
    one, other = new_run_id("My recipe/é"), new_run_id("digits")
    assert one != other
    assert one.split("-", 2)[2].rpartition("-")[0] == "my-recipe"
    Store("unused").at("runs", one)  # refuses what is not a plain name
