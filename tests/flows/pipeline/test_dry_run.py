"""`sftok run --dry-run`: the digests that the run would have, what is there, and estimates that say what they are."""

import json
from pathlib import Path

import pytest
import torch

from flows.cli.main import main
from flows.pipeline import graph
from flows.pipeline.dry_run import RATE_SOURCE, _arithmetic, dry_run
from flows.pipeline.space import Sizes
from flows.recipes.registry import RECIPES
from flows.requests.checks import check_request
from flows.runs.run_request import RunArguments
from infra.artifacts.manifest import folder_of
from infra.store.store import Store
from sftok.model.tokenizer import SFTok
from sftok.sources import sources
from tests.support.small_dataset import draw_images


def request(store: str, recipe: str = "digits", data: str | None = None, *overrides: str):
    asked = RunArguments(recipe=recipe, data=data, store=store, overrides=overrides, workers=2)
    return check_request(asked, is_run=False)


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["run", *(str(argument) for argument in arguments)])
    return int(ended.value.code or 0)


def test_names_the_artifacts_that_a_run_makes(run_pipeline, tmp_path: Path) -> None:
    record = run_pipeline("whole")
    planned = dry_run(request(record.store, "digits"))
    made = {name: (stage.ref.kind, stage.ref.digest) for name, stage in record.stages.items()}
    assert {stage.stage: (stage.kind, stage.digest) for stage in planned.stages} == made
    assert {stage.state for stage in planned.stages} == {"Cached"}
    store = Store(record.store)
    ref = record.stages["encode"].ref
    folder_of(store, ref.kind, ref.digest).delete("manifest.json")
    states = {stage.stage: stage.state for stage in dry_run(request(record.store, "digits")).stages}
    assert {name for name, state in states.items() if state != "Cached"} == {"encode"}


def test_before_prepare_only_what_the_listing_decides_is_known(tmp_path: Path) -> None:
    draw_images(tmp_path / "images")
    planned = dry_run(request(str(tmp_path / "store"), "digits", str(tmp_path / "images")))
    states = {stage.stage: stage.state for stage in planned.stages}
    assert states.pop("prepare") == "to do"
    hours = {stage.stage: stage.gpu_hours for stage in planned.stages}
    assert 0 < hours["train_second_generator"] != hours["train_generator"] > 0
    assert set(states.values()) == {"after prepare"}
    assert planned.images == 22
    assert not (tmp_path / "store").exists(), "a dry run writes nothing"


def test_the_source_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_images(tmp_path / "images")
    listed, real = [], sources.list_source
    monkeypatch.setattr(sources, "list_source", lambda *given: listed.append(given) or real(*given))
    assert dry_run(request(str(tmp_path / "store"), "digits", str(tmp_path / "images"))).listing.images == 22
    assert len(listed) == 1


def test_the_paper_needs_no_weights_to_be_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw_images(tmp_path / "images")
    arguments = ["imagenet256_sftok_b", "--data", tmp_path / "images", "--store", tmp_path / "store", "--dry-run"]
    assert run(*arguments, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert [stage["stage"] for stage in told["stages"]] == [n for n in graph.GRAPH if n != "train_second_generator"]
    assert told["estimates"]["gpu_hours"] == RATE_SOURCE
    assert (told["listing"]["kind"], told["listing"]["images"], told["listing"]["splits"]) == (
        "folder",
        22,
        {"by hash": 22},
    )
    hours = {stage["stage"]: stage["gpu_hours"] for stage in told["stages"]}
    assert hours["align"] > 4 * hours["warm_up"] > 0, "four times the steps, and the guide's pass"
    assert hours["teacher"] == 0, "it is imported"
    assert run(*arguments) == 0
    out = capsys.readouterr().out
    assert "GPU hours" in out
    assert "assumed" in out
    assert not (tmp_path / "store").exists()


def test_arithmetic_is_that_of_the_networks() -> None:
    """Of the base encoder two operations a weight and position, as every transformer has; the rest is attention."""
    recipe = RECIPES["imagenet256_sftok_b"]()
    found = _arithmetic(recipe)
    with torch.device("meta"):
        model = SFTok(recipe.tokenizer, recipe.teacher.model, 256, pixels=False)
    blocks = sum(p.numel() for name, p in model.encoder.named_parameters() if "blocks" in name and p.ndim == 2)
    assert found["encoder"] == pytest.approx(2 * blocks * 321, rel=0.1)
    whole = 4 * sum(p.numel() for p in model.parameters())
    assert Sizes.of(recipe, None).artifacts["align"] > whole, "with the pixel decoder"
