"""What cannot fit in a GPU is refused, and each remedy that is named is carried out here."""

import json
from pathlib import Path

import pytest

from flows.cli.main import main
from flows.pipeline import gpu_memory
from flows.pipeline.dry_run import dry_run as plan
from flows.pipeline.gpu_memory import Card, Ranked, check_memory, memory_of, remedies
from flows.recipes.files import load_recipe, to_toml
from flows.recipes.registry import RECIPES
from flows.requests import choose_device, gpu_card
from flows.requests.checks import check_request
from flows.requests.gpu_card import find_card
from flows.results.health.rules import SETTINGS
from flows.runs.run_request import RunArguments
from infra.settings import Settings
from infra.training.config import or_list
from tests.support.small_dataset import draw_images

GB = 10**9
PLAIN = ("compile=false",)


def asked(name: str, stage: str, *changes: str, ranks: int = 1) -> Ranked:
    """A recipe whose blocks are not compiled, so that all that is counted is taken."""
    overrides = [f"{SETTINGS[stage]}.{change}" for change in (*PLAIN, *changes)]
    return Ranked.on_gpus(load_recipe(name, overrides=overrides), ranks)


# Stage, ranks, gigabytes of a GPU, GPUs that there are, and how many remedies are found.
CASES = [
    ("imagenet256_ar_3b", "train_generator", 1, 80, None, 3),  # a smaller micro-batch, recomputation, or two ranks
    ("imagenet256_ar_3b", "train_generator", 1, 80, 1, 2),
    ("imagenet256_ar_3b", "train_generator", 1, 40, None, 1),  # shards alone
    ("imagenet256_ar_3b", "train_generator", 1, 8, None, 1),  # 32 ranks, and recomputation
    ("imagenet256_ar_3b", "train_generator", 1, 40, 1, 0),
    ("imagenet256_ar_xl", "train_generator", 1, 24, None, 3),
    ("imagenet256_ar_xl", "train_generator", 1, 16, 1, 0),
    ("imagenet256_maskgit", "train_generator", 8, 10, None, 3),
    ("small64", "align", 1, 1.2, None, 1),
    ("digits", "teacher", 1, 1.05, None, 1),
]


@pytest.mark.parametrize(("name", "stage", "ranks", "size", "most", "count"), CASES)
def test_every_remedy_makes_it_fit(
    name: str, stage: str, ranks: int, size: float, most: int | None, count: int
) -> None:
    before, card = asked(name, stage, ranks=ranks), Card(int(size * GB), "this machine's GPUs")
    with pytest.raises(ValueError, match=rf"^{stage} needs at least .* of a GPU's memory \(above all ") as refused:
        check_memory(before, card, [stage], most_ranks=most)
    found = remedies(before, stage, int(size * GB), most)
    assert len(found) == count
    for remedy in found:
        assert str(remedy) in str(refused.value)
        after = before.changed(*remedy.overrides, ranks=remedy.ranks)
        check_memory(after, card, [stage])
        assert (remedy.ranks or ranks) <= (most or 1000)
        assert not after.recipe.trainings()[stage].micro_batches % after.ranks, "the ranks can share a step"
    assert len(str(refused.value)) <= 400
    assert "\n" not in str(refused.value)
    if not found:
        assert "use GPUs with more memory" in str(refused.value)
        assert ("or more of them" in str(refused.value)) == stage.endswith("generator")


def test_the_largest_micro_batch_and_the_fewest_ranks_are_named() -> None:
    before, stage = asked("imagenet256_ar_xl", "train_generator"), "train_generator"
    card = 24 * GB
    smaller, _, sharded = remedies(before, stage, card)
    size = int(smaller.overrides[0].rpartition("=")[2])
    assert not gpu_memory._need(before.changed(f"train_generator.micro_batch={2 * size}"), stage).fits(card)
    assert sharded.ranks is not None
    if sharded.ranks > 2:
        fewer = before.changed(*sharded.overrides, ranks=sharded.ranks // 2)
        assert not gpu_memory._need(fewer, stage).fits(card)


def test_a_micro_batch_that_the_discriminator_cannot_divide_is_no_remedy() -> None:
    settings = [f"fine_tune.training.{each}" for each in ("batch_size=36", "micro_batch=12")]
    dino = [f"fine_tune.adversarial.{each}" for each in ("weight=0.1", "kind=dino", "start_step=1")]
    before = Ranked.on_gpus(load_recipe("digits", overrides=[*settings, *dino]), 1)
    largest = gpu_memory._smaller(before, "fine_tune", lambda changed: True)
    assert largest is not None
    assert largest.overrides == ("fine_tune.training.micro_batch=6",), "9 does not divide into two equal groups"
    assert gpu_memory._smaller(before, "fine_tune", lambda changed: False) is None


def test_what_is_compiled_is_refused_only_if_half_of_it_does_not_fit() -> None:
    stage = "train_generator"
    compiled = Ranked.on_gpus(load_recipe("imagenet256_ar_xl", overrides=()), 1)
    memory = memory_of(compiled, stage)
    assert memory.least.activations == memory.need.activations // 2
    assert str(memory).startswith("at most ")
    between = Card((memory.need.total + memory.least.total) // 2 + GB, "GPUs")
    check_memory(compiled, between, [stage])
    with pytest.raises(ValueError, match="train_generator needs at least"):
        check_memory(asked("imagenet256_ar_xl", stage), between, [stage])


def test_nothing_is_counted_where_the_memory_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_memory, "memory_of", None)
    check_memory(asked("digits", "align"), Card(), ["align"])
    monkeypatch.setattr(gpu_card, "gpu_memory", lambda: None)
    assert find_card(Settings()) == Card()


def test_stated_memory_counts_before_what_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_card, "gpu_memory", lambda: 24 * GB)
    monkeypatch.setattr(gpu_card, "cluster_gpu_memory", lambda address: {"head:6379": 40 * GB}[address])
    assert find_card(Settings()) == (24 * GB, "this machine's GPUs")
    joined = Settings(SFTOK_RAY_ADDRESS="head:6379")
    assert find_card(joined) == (40 * GB, "the GPUs of the Ray cluster at head:6379")
    monkeypatch.setenv("SFTOK_GPU_MEMORY", "80")
    assert find_card(Settings()).bytes == 80 * GB
    assert find_card(Settings(), 16).bytes == 16 * GB


def test_a_run_is_refused_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose_device, "gpus_there", lambda settings, is_run: 2.0)
    monkeypatch.setattr("flows.requests.checks.gpus_there", lambda settings, is_run: 2.0)
    monkeypatch.setenv("SFTOK_GPU_MEMORY", "1.2")
    large = ("train_generator.batch_size=4096", "compute.device=cuda")
    arguments = RunArguments(recipe="digits", store=str(tmp_path / "store"), overrides=large, workers=0)
    refused = r"^train_generator needs .*, and the GPUs of SFTOK_GPU_MEMORY have 1.2 GB: set"
    with pytest.raises(ValueError, match=refused):
        check_request(arguments)
    assert not (tmp_path / "store").exists()
    monkeypatch.setenv("SFTOK_GPU_MEMORY", "8")
    monkeypatch.setattr("flows.requests.checks.warn_of_slow", lambda *_: None)  # asks the GPU, which is not there
    check_request(arguments)


def dry_run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["run", *(str(argument) for argument in arguments)])
    return int(ended.value.code or 0)


def test_a_dry_run_states_memory_ranks_and_hours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw_images(tmp_path / "images")
    cut = [f"--set={SETTINGS[stage]}.micro_batch=8" for stage in RECIPES["digits"]().trainings()]
    plan = ["digits", "--data", tmp_path / "images", "--store", tmp_path / "store", "--dry-run", *cut]
    assert dry_run(*plan, "--ranks", 4, "--gpu-memory", 40, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    stages = {stage["stage"]: stage for stage in told["stages"]}
    trained = stages["train_generator"]
    assert trained["hours"] == pytest.approx(trained["gpu_hours"] / 4)
    assert trained["rank_counts"] == [1, 2, 4, 8]
    parts = {name: size for name, size in trained["memory"].items() if name not in ("total", "least")}
    assert sum(parts.values()) == trained["memory"]["total"] == trained["memory"]["least"]
    assert {"weights", "gradients", "moments", "ema", "best", "activations", "logits"} == set(parts)
    assert stages["prepare"]["memory"] is None
    assert told["gpu_memory"] == {"bytes": 40 * GB, "source": "the GPUs that are planned for"}
    assert dry_run(*plan, "--gpu-memory", 1.01) == 2
    shown = capsys.readouterr()
    assert "8 micro-batches a step, so ranks: 1, 2, 4 or 8" in shown.out
    assert "memory of a GPU: 1.0 GB, the GPUs that are planned for" in shown.out
    assert shown.err.startswith("sftok: teacher needs at least ")


def test_a_plan_on_a_cpu_counts_what_gpus_compile(tmp_path: Path) -> None:
    """Guards against settings that the machine which plans has decided."""
    draw_images(tmp_path)
    arguments = RunArguments(recipe="small64", data=str(tmp_path), store=str(tmp_path / "store"))
    open_recipe = arguments.request().recipe
    wide = open_recipe.model_copy(update={"generator": open_recipe.generator.model_copy(update={"width": 512})})
    planned = plan(check_request(arguments, is_run=False), on_gpus=wide)
    memory = {stage.stage: stage.memory for stage in planned.stages}["train_generator"]
    assert memory is not None
    assert memory.least.total < memory.need.total


def test_memory_is_stated_for_plans_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dry_run("digits", "--store", tmp_path, "--gpu-memory", 40) == 2
    assert "--gpu-memory is what is planned for: add --dry-run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("numbers", "words"), [([1], "1"), ([1, 2], "1 or 2"), ([1, 2, 4], "1, 2 or 4"), (range(1, 9), "1, 2, 3, 4 ... 8")]
)
def test_choices_are_written_out(numbers: list[int], words: str) -> None:
    assert or_list(numbers) == words


def test_a_recipe_says_which_ranks_it_allows() -> None:
    text = to_toml(RECIPES["imagenet256_sftok_b"]())
    align = text.partition("[align.training]")[2]
    assert align.splitlines()[1] == "# 8 micro-batches a step, which ranks share equally: --ranks 1, 2, 4 or 8"
