"""Throughput figures: counted and excluded steps, and the peak of a device."""

import time

import pytest
import torch

from infra.training import speed
from infra.training.speed import Clock, Effort, peak_flops


class Hands:
    """A clock that the test advances."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


def test_rates_are_those_of_the_steps_alone_and_without_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    hands = Hands(monkeypatch)
    clock = Clock(Effort({"tokens": 100, "images": 2}, flops=1e9), peak=1e10)
    assert clock.figures() == {}
    for seconds in (9.0, 0.5, 0.25, 0.25):
        with clock.step():
            hands.now += seconds
        hands.now += 100  # a validation
        if seconds == 9.0:
            assert clock.figures()["tokens_per_s"] == pytest.approx(100 / 9)
    assert clock.figures() == pytest.approx(
        {"tokens_per_s": 300, "images_per_s": 6, "model_flops_per_s": 3e9, "mfu": 0.3}
    )


def test_operations_that_join_later_count_from_their_step_on(monkeypatch: pytest.MonkeyPatch) -> None:
    hands = Hands(monkeypatch)
    clock = Clock(Effort({}, flops=1e9, later_flops=2e9, later_from=3), peak=None)
    for step in range(1, 5):
        with clock.step(step):
            hands.now += 1
    assert clock.figures() == {"model_flops_per_s": (1e9 + 3e9 + 3e9) / 3}  # the first one is left out


def test_without_a_known_peak_there_is_no_share_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    hands = Hands(monkeypatch)
    clock = Clock(Effort({"tokens": 1}, flops=1e9), peak=None)
    with clock.step():
        hands.now += 1
    assert clock.figures() == {"tokens_per_s": 1, "model_flops_per_s": 1e9}


@pytest.mark.parametrize(
    ("name", "half", "single"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA H100 80GB HBM3", 989e12, 67e12),
        ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA L40S", 362e12, 91.6e12),
        ("NVIDIA L4", 121e12, 30.3e12),
        ("Tesla T4", 65e12, 8.1e12),
        ("NVIDIA GeForce GTX 1080", None, None),
    ],
)
def test_gpus_are_told_apart_by_their_names(name: str, half: float | None, single: float | None) -> None:
    assert speed._listed_peak(name, "bf16") == half
    assert speed._listed_peak(name, "fp32") == single


def test_single_precision_by_tf32_has_a_peak_of_its_own_where_a_gpu_has_it() -> None:
    names = ("NVIDIA H200", "NVIDIA A100-SXM4-80GB", "Tesla T4")
    assert [speed._listed_peak(name, "fp32", is_tf32=True) for name in names] == [494.5e12, 156e12, 8.1e12]
    assert speed._listed_peak("NVIDIA H200", "bf16", is_tf32=True) == 989e12


def test_the_peak_of_a_processor_is_timed_and_leaves_randomness_alone() -> None:
    state = torch.get_rng_state()
    found = peak_flops("cpu", "fp32")
    assert found is not None
    assert 1e8 < found < 1e14
    assert torch.equal(torch.get_rng_state(), state)
