"""The graph of stages: which a run makes, in which order, and that one object is all that a new stage takes."""

from pathlib import Path

import pytest
from pydantic import JsonValue

from flows.pipeline import graph
from flows.pipeline.dry_run import dry_run
from flows.recipes.files import load_recipe
from flows.report.pages import STAGE_OF_INPUT
from flows.requests.checks import check_request
from flows.runs.history import records
from flows.runs.journal import RunRecord
from flows.runs.run_request import RunArguments
from flows.stage import Graph, Result, Stage, StageJob, Work
from infra.artifacts.lineage import resolve
from infra.artifacts.manifest import verify
from infra.artifacts.shards import put
from infra.store.store import Store


def _what(job: StageJob) -> dict[str, JsonValue]:
    return {"seed": job.recipe.seed}


def _call(work: Work) -> Result:
    return Result([put(work.out, "count.txt", b"3")], {"codes": 3}, {})


TOY = Stage("count", "count", 1, _what, _call, needs={"codes": "encode"})


def names(recipe_overrides: list[str], **changes: object) -> list[str]:
    recipe = load_recipe("digits", overrides=recipe_overrides)
    return [stage.name for stage in graph.GRAPH.order(recipe, **changes)]


def test_a_run_makes_every_stage_in_the_graphs_order() -> None:
    assert names([]) == list(graph.GRAPH)


def test_what_nobody_needs_is_left_out() -> None:
    assert names(["align.from_scratch=true"]) == [name for name in graph.GRAPH if name != "warm_up"]
    without_second = [name for name in graph.GRAPH if name != "train_second_generator"]
    assert names(["evaluate.sweep.cfg_scales=[]"]) == without_second
    imported = load_recipe("digits", overrides=["teacher.origin=imported"])
    assert graph.TEACHER.inputs(imported) == {}
    assert graph.ALIGN.inputs(imported) == {"images": "prepare", "teacher": "teacher", "tokenizer": "warm_up"}


@pytest.mark.parametrize(
    ("last", "given", "made"),
    [
        ("encode", ["fine_tune"], ["prepare", "encode"]),
        ("encode", ["prepare", "fine_tune"], ["encode"]),
        ("train_generator", ["encode"], ["train_generator"]),
        ("align", ["prepare"], ["teacher", "warm_up", "align"]),
    ],
)
def test_what_is_given_is_not_made(last: str, given: list[str], made: list[str]) -> None:
    assert names([], last=last, given=given) == made


def test_a_stage_comes_after_what_it_needs() -> None:
    with pytest.raises(AssertionError, match="count needs encode, which must come before it"):
        Graph(TOY, graph.PREPARE)


def test_the_page_calls_stages_what_the_graph_calls_them() -> None:
    needed = {name: of for stage in graph.GRAPH.values() for name, of in stage.needs.items()}
    assert {name: of for name, of in needed.items() if name not in ("teacher", "tokenizer")} == STAGE_OF_INPUT


def test_a_new_stage_is_one_object(run_pipeline, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs in the flow, is found in the next run, and shows in the plan and in the record."""
    monkeypatch.setattr(graph, "GRAPH", Graph(*graph.GRAPH.values(), TOY))
    run_pipeline("toy-first")
    record = RunRecord.model_validate_json(store.read("runs/toy-first/run.json"))
    assert list(record.stages) == [*graph.GRAPH]
    assert record.stages["count"].state == "Completed"
    made = resolve(store, str(record.stages["count"].ref))
    verify(store, made)
    assert made.inputs["codes"] == record.stages["encode"].ref
    assert {stage.state for stage in run_pipeline("toy-second").stages.values()} == {"Cached"}
    assert [list(one.stages) for one in records(store)] == [[*graph.GRAPH]] * 2
    asked = RunArguments(recipe="digits", store=store.uri, workers=0)
    planned = {one.stage: one for one in dry_run(check_request(asked, is_run=False)).stages}
    assert (planned["count"].digest, planned["count"].state) == (made.digest, "Cached")
