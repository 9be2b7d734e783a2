"""Slow precisions: measured on CPUs, known for GPUs, and explained as part of a sentence."""

import pytest
import torch

from infra.compute import precision
from infra.compute.precision import precision_ratio, slow_because


@pytest.fixture(autouse=True)
def _measured_anew() -> None:
    precision_ratio.cache_clear()


def test_the_ratio_is_that_of_the_best_of_some_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first product, for which kernels are created, does not count, nor does time between the others."""
    taken = {torch.bfloat16: [9.0, 0.5, 0.25, 0.75], torch.float32: [0.001, 2.0, 3.0, 1.0]}
    monkeypatch.setattr(precision, "_seconds", lambda a: taken[a.dtype].pop(0))
    assert precision_ratio("bf16") == 4.0
    assert taken == {torch.bfloat16: [], torch.float32: []}
    assert precision_ratio("bf16") == 4.0, "measured once a process"


def test_measuring_leaves_randomness_and_threads_alone() -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    assert 1e-4 < precision_ratio("bf16") < 100
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX2" or torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="of CPUs with AVX2 and no instructions for bfloat16",
)
def test_bf16_is_found_to_be_slow_on_a_cpu_without_its_instructions() -> None:
    assert slow_because("bf16", "cpu") is not None


def test_what_is_slow_is_said_with_the_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "precision_ratio", {"bf16": 0.0581, "fp16": 1.0}.__getitem__)
    said = slow_because("bf16", "cpu")
    assert said is not None
    assert said.startswith("bf16 products run at 0.058 times the speed of fp32 on this CPU (")
    assert precision.cpu_features() in said
    assert slow_because("fp16", "cpu") is None
    assert slow_because("fp32", "cpu") is None


@pytest.mark.parametrize(
    ("capability", "chosen", "is_slow"),
    [((7, 5), "bf16", True), ((7, 5), "fp16", False), ((8, 0), "bf16", False), ((9, 0), "fp16", False)],
)
def test_a_gpu_is_judged_by_its_capability(
    capability: tuple[int, int], chosen: str, is_slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    assert (slow_because(chosen, "cuda") == "Tesla T4 has no bf16 instructions") is is_slow
