"""Precisions that the machine is slow in are said in a line before work begins, and no default chooses one."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from flows.recipes.files import load_recipe
from flows.recipes.registry import RECIPES
from flows.recipes.schema import EncodeConfig
from flows.requests.checks import check_request
from flows.requests.encode import check_encode_request
from flows.requests.generator import check_generator_request
from flows.requests.precisions import precisions_of, warn_of_slow
from flows.runs.run_request import RunArguments
from infra.compute import precision
from infra.compute.rank_count import ONE
from infra.settings import Settings
from infra.store.store import Store
from tests.flows.inference.test_sample import a_generator, run
from tests.support.small_codes import TOKENIZER, codes, names
from tests.support.small_dataset import Made
from tests.support.weights_cli import a_tokenizer, published

SMALL = sorted(name for name in RECIPES if not name.startswith("imagenet256_"))


@pytest.fixture
def slow_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without instructions for bf16 and fp16, and without a GPU."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("SFTOK_RAY_ADDRESS", raising=False)
    monkeypatch.setattr("infra.compute.device.default_device", lambda: "cpu")
    monkeypatch.setattr("flows.requests.choose_device.default_device", lambda: "cpu")
    monkeypatch.setattr(precision, "precision_ratio", {"bf16": 0.25, "fp16": 0.03}.__getitem__)
    monkeypatch.setattr(precision, "cpu_features", lambda: "avx2")


def precision_fields(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from precision_fields(value, f"{prefix}{name}.")
        elif name == "precision":
            yield prefix + name


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "flows.requests.precisions"]


def test_every_precision_of_a_recipe_is_looked_at() -> None:
    recipe = load_recipe("digits", overrides=["evaluate.scores.protocol=clean"]).on("cpu")
    assert set(precisions_of(recipe)) == set(precision_fields(recipe.model_dump()))


def test_what_is_not_computed_is_not_looked_at() -> None:
    overrides = ["teacher.origin=imported", "align.from_scratch=true", "evaluate.sweep.cfg_scales=[]"]
    left_out = set(precisions_of(load_recipe("digits"))) - set(
        precisions_of(load_recipe("digits", overrides=overrides))
    )
    assert left_out == {
        "teacher.training.precision",
        "warm_up.training.precision",
        "evaluate.sweep.train_generator.precision",
    }


@pytest.mark.parametrize("name", SMALL)
def test_recipes_for_cpus_compute_in_fp32(name: str) -> None:
    assert set(precisions_of(RECIPES[name]().on("cpu")).values()) == {"fp32"}


@pytest.mark.parametrize("name", sorted(set(RECIPES) - set(SMALL)))
def test_published_recipes_keep_to_half_precision_where_it_is_published(name: str) -> None:
    """In training alone, which is meant for GPUs."""
    chosen = precisions_of(RECIPES[name]().on("cpu"))
    half = {option for option, value in chosen.items() if value != "fp32"}
    trained = {f"{stage}.training.precision" for stage in ("warm_up", "align", "fine_tune")}
    assert half == trained | {"train_generator.precision"}


@pytest.mark.usefixtures("slow_half")
def test_each_precision_is_a_line_with_all_its_options(caplog: pytest.LogCaptureFixture) -> None:
    chosen = {"a.precision": "bf16", "b.precision": "fp16", "c.precision": "bf16", "d.precision": "fp32"}
    warn_of_slow(chosen, Settings(), "cpu")
    assert lines(caplog) == [
        "a.precision, c.precision = bf16: bf16 products run at 0.25 times the speed of fp32 on this CPU (avx2); "
        "a.precision=fp32, c.precision=fp32 would be faster",
        "b.precision = fp16: fp16 products run at 0.03 times the speed of fp32 on this CPU (avx2); "
        "b.precision=fp32 would be faster",
    ]


@pytest.mark.usefixtures("slow_half")
def test_other_machines_than_this_one_are_not_judged(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_slow({"a.precision": "bf16"}, Settings().model_copy(update={"ray_address": "10.0.0.1:6379"}), "cpu")
    assert lines(caplog) == []


@pytest.mark.usefixtures("slow_half")
@pytest.mark.parametrize("chosen", ["fp32", "bf16"])
def test_a_run_says_so_before_it_begins(
    chosen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SFTOK_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    overrides = (f"encode.precision={chosen}",)
    check_request(RunArguments(recipe="digits", store=str(tmp_path / "store"), overrides=overrides, workers=0))
    assert [line.partition(":")[0] for line in lines(caplog)] == ["encode.precision = bf16"] * (chosen == "bf16")


@pytest.mark.usefixtures("slow_half")
def test_encoding_and_training_a_generator_say_so(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SFTOK_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    tokenizer = str(published(store, a_tokenizer()))
    place = {"store": store.uri, "overrides": ()}
    encode = {"tokenizer": tokenizer, "data": "sklearn:digits", "workers": 0, "gpus_per_worker": None, **place}
    check_encode_request(EncodeConfig(precision="bf16"), **encode)
    ref = str(codes(Made(store, tmp_path), names(TOKENIZER, TOKENIZER, TOKENIZER)))
    check_generator_request("imagenet256_ar_b", codes=ref, ranks=ONE, seed=None, **place)
    assert [line.partition(":")[0] for line in lines(caplog)] == [
        "--precision = bf16",
        "train_generator.precision = bf16",
    ]


@pytest.mark.usefixtures("slow_half")
def test_sampling_says_so_on_stderr_unless_it_was_done_before(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    ref = a_generator(store, published(store, a_tokenizer()).digest)
    given = ["--generator", ref, "--store", store.uri, "--per-class", 1, "--workers", 0, "--precision", "bf16"]
    told = []
    for _ in range(2):
        assert run(*given, "--json") == 0
        printed = capsys.readouterr()
        assert json.loads(printed.out)["count"] == 4
        told.append("--precision = bf16: bf16 products run at 0.25 times the speed of fp32" in printed.err)
    assert told == [True, False]
