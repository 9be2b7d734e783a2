"""Which device a run computes on, and what of it is part of an identity."""

import json
import sys
from pathlib import Path

import pytest

from flows.ablation.arm import ABLATION_ARM
from flows.pipeline.graph import GRAPH
from flows.recipes.files import load_recipe
from flows.recipes.registry import RECIPES
from flows.recipes.schema import ComputeConfig
from flows.requests import choose_device as devices
from flows.requests.checks import check_request, compiles_steps
from flows.requests.choose_device import choose_device
from flows.runs.run_request import RunArguments
from flows.stage import StageJob, plan_of
from infra.compute.rank_count import RankCount
from infra.compute.workers import WorkerOptions
from infra.settings import Settings
from infra.store.store import Store
from tests.support import ROOT

GOLDEN = ROOT / "tests" / "golden" / "digests.json"


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):
    def have(here: float, cluster: float = 0.0) -> None:
        monkeypatch.setattr(devices, "gpus_there", lambda settings, is_run: cluster if settings.ray_address else here)

    return have


@pytest.mark.parametrize(
    ("device", "asked", "address", "here", "cluster", "chosen"),
    [
        ("auto", None, None, 0, 0, ("cpu", 0.0)),
        ("auto", None, None, 2, 0, ("cuda", 1.0)),
        ("auto", 0.5, None, 2, 0, ("cuda", 0.5)),
        ("auto", 0.0, None, 2, 0, ("cpu", 0.0)),
        ("cpu", None, None, 2, 0, ("cpu", 0.0)),
        ("cuda", None, None, 1, 0, ("cuda", 1.0)),
        ("auto", None, "head:6379", 0, 8, ("cuda", 1.0)),  # the cluster decides, not the machine that asks
        ("auto", None, "head:6379", 4, 0, ("cpu", 0.0)),
    ],
)
def test_the_place_decides_unless_it_is_told(gpus, device, asked, address, here, cluster, chosen) -> None:
    gpus(here, cluster)
    assert (
        choose_device(ComputeConfig(device=device), gpus=asked, settings=Settings(SFTOK_RAY_ADDRESS=address)) == chosen
    )


@pytest.mark.parametrize(
    ("device", "asked", "address", "ranks", "there", "said"),
    [
        ("cuda", None, None, 1, 0, "compute.device = cuda, but this machine has no GPU .*--device cpu"),
        ("auto", 1.0, "head:6379", 1, 0, "gpus_per_worker = 1, but the Ray cluster at head:6379 has no GPU"),
        ("cpu", 1.0, None, 1, 4, "gpus_per_worker = 1, but compute.device = cpu: leave one of them out"),
        ("auto", None, None, 8, 2, "--ranks 8, but this machine has 2 GPUs"),
        ("cuda", 0.0, None, 1, 4, "gpus_per_worker = 0, but compute.device = cuda: leave one of them out"),
        ("auto", 2.0, None, 1, 4, "gpus_per_worker = 2: a worker computes on one GPU, .* a number from 0 to 1"),
        ("auto", float("nan"), None, 1, 4, "gpus_per_worker = nan: a worker computes on one GPU"),
        ("auto", float("inf"), "head:6379", 1, 4, "gpus_per_worker = inf: a worker computes on one GPU"),
        ("cpu", -1.0, None, 1, 0, "gpus_per_worker = -1: a worker computes on one GPU"),
    ],
)
def test_gpus_where_there_are_none_are_refused_in_a_line(gpus, device, asked, address, ranks, there, said) -> None:
    gpus(there, there)
    with pytest.raises(ValueError, match=said) as refused:
        choose_device(
            ComputeConfig(device=device),
            gpus=asked,
            settings=Settings(SFTOK_RAY_ADDRESS=address),
            ranks=RankCount(ranks, ranks),
        )
    assert "\n" not in str(refused.value)


def test_a_cluster_counts_the_gpus_that_it_grows_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a refusal where GPUs come when a run asks for them."""
    monkeypatch.setattr(devices, "cluster_gpus", lambda address: 0.0)
    monkeypatch.setenv("SFTOK_RAY_ADDRESS", "head:6379")
    with pytest.raises(ValueError, match=r"has no GPU .* say what it grows to in SFTOK_RAY_MAX_GPUS"):
        choose_device(ComputeConfig(device="cuda"), gpus=None, settings=Settings())
    monkeypatch.setenv("SFTOK_RAY_MAX_GPUS", "32")
    assert choose_device(ComputeConfig(), gpus=None, settings=Settings(), ranks=RankCount(8, 8)) == ("cuda", 1.0)


def digests(name: str, *overrides: str) -> dict[str, str]:
    job = StageJob(load_recipe(name, overrides=overrides, seed=None), Store("nowhere"), "digits", WorkerOptions())
    # The images' listing decides prepare's; a report holds the whole recipe, and is written anew in a second.
    stages = [*(stage for stage in GRAPH.order(job.recipe) if stage.name not in ("prepare", "report")), ABLATION_ARM]
    return {stage.name: plan_of(stage, job, {}).digest for stage in stages}


def test_digests_on_cpus_are_those_of_before() -> None:
    """Of every recipe and stage, its inputs left out: a change of one makes everybody compute it again."""
    assert {name: digests(name, "compute.device=cpu") for name in sorted(RECIPES)} == json.loads(GOLDEN.read_text())


def test_what_a_gpu_computes_has_digests_of_its_own() -> None:
    cpu, cuda = digests("digits", "compute.device=cpu"), digests("digits", "compute.device=cuda")
    assert not set(cpu.values()) & set(cuda.values())
    for setting in ("fp32=tf32", "deterministic=true", "cudnn_benchmark=true"):
        other = digests("digits", "compute.device=cuda", f"compute.{setting}")
        assert not set(other.values()) & set(cuda.values()), setting
        assert digests("digits", "compute.device=cpu", f"compute.{setting}") == cpu  # a CPU has no such switches


def test_an_imported_teacher_is_the_same_everywhere() -> None:
    weights = ("teacher.origin=imported", f"teacher.pretrained.sha256={'a' * 64}", "teacher.pretrained.uri=x")
    cpu = digests("digits", "compute.device=cpu", *weights)
    assert cpu["teacher"] == digests("digits", "compute.device=cuda", *weights)["teacher"]


def test_settings_that_are_left_open_fit_the_device() -> None:
    recipe = load_recipe("imagenet256_sftok_b", overrides=(), seed=None)
    cpu, cuda = recipe.on("cpu"), recipe.on("cuda")
    assert (cpu.encode.precision, cpu.sample.precision, cpu.decoding.precision) == ("fp32",) * 3
    assert (cuda.encode.precision, cuda.sample.precision, cuda.decoding.precision) == ("bf16",) * 3
    assert (cpu.sample.compile, cuda.sample.compile) == (False, True)
    assert (cpu.encode.micro_batch, cuda.encode.micro_batch) == (64, 256)
    assert (cpu.align.training.compile, cuda.align.training.compile) == (False, True)
    assert cuda.train_generator.compile
    assert not load_recipe("digits", overrides=(), seed=None).on("cuda").align.training.compile  # nothing to gain
    assert cuda.on("cuda") == cuda  # settled once
    asked = load_recipe("digits", overrides=("encode.precision=fp32", "sample.compile=false"), seed=None).on("cuda")
    assert (asked.encode.precision, asked.sample.compile) == ("fp32", False)


def test_a_gpu_without_bf16_computes_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """A default never chooses a precision that the device is slow in."""
    for name, precision in {
        "Tesla T4": "fp32",
        "Tesla V100-SXM2-16GB": "fp32",
        "NVIDIA GeForce RTX 2080 Ti": "fp32",
        "NVIDIA T4G": "fp32",
        "NVIDIA T1000 8GB": "fp32",
        "Quadro P5000": "fp32",
        "Tesla M40": "fp32",
        "NVIDIA H200": "bf16",
        "NVIDIA A10G": "bf16",
        "NVIDIA GH200 480GB": "bf16",
        "NVIDIA A100-SXM4-80GB": "bf16",
        "NVIDIA L4": "bf16",
        "NVIDIA GeForce RTX 4090": "bf16",
    }.items():
        monkeypatch.setattr("infra.compute.device.gpu_names", lambda name=name: [name])
        recipe = load_recipe("digits", overrides=(), seed=None).on("cuda")
        assert {recipe.encode.precision, recipe.sample.precision, recipe.decoding.precision} == {precision}, name
        assert recipe.on("cpu").compute.device == "cpu"


def test_a_small_generator_needs_no_compiler_on_cuda() -> None:
    """Guards against a refusal of `digits` on a GPU without gcc."""
    small, large = (load_recipe(name, overrides=(), seed=None) for name in ("digits", "imagenet256_ar_b"))
    assert not compiles_steps(small.on("cuda"))
    assert compiles_steps(large.on("cuda"))
    assert not compiles_steps(large.on("cpu"))


def test_settings_that_were_asked_for_survive_the_record(tmp_path: Path) -> None:
    """Guards against a rerun that computes in another precision than its run did."""
    from flows.recipes.schema import Recipe

    asked = load_recipe("digits", overrides=("decoding.precision=fp32", "compute.fp32=tf32"), seed=None).on("cuda")
    again = Recipe.model_validate_json(asked.model_dump_json()).on("cuda")
    assert again == asked


def test_a_decoder_that_is_not_installed_is_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(ValueError, match=r'encode\.decoder = "torchcodec" needs torchcodec .* pip install torchcodec'):
        check_request(
            RunArguments(
                recipe="digits", store=str(tmp_path / "store"), overrides=("encode.decoder=torchcodec",), workers=0
            )
        )
    assert not (tmp_path / "store").exists()
