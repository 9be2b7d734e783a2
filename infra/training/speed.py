"""Measure training throughput: items and model FLOPs per second, and model FLOPs utilization (MFU)."""

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from infra.config import Precision

# Dense TFLOP/s in half precision, in single precision, and in single precision by TF32 if the GPU has it, from the
# vendor's data sheets (whose tensor-core figures for sparse products are twice as high).
PEAKS: dict[str, tuple[float, float, float]] = {
    "H200": (989, 67, 494.5),
    "H100 PCIE": (756, 51, 378),
    "H100": (989, 67, 494.5),
    "A100": (312, 19.5, 156),
    "L40S": (362, 91.6, 183),
    "L4": (121, 30.3, 60),
    "A10G": (70, 35, 35),
    "V100": (125, 15.7, 15.7),
    "T4": (65, 8.1, 8.1),
}
SIDE = 768  # of the matrix product that is timed on a CPU
ROUNDS = 3


@dataclass(frozen=True)
class Effort:
    """Work of one training step, over all ranks."""

    items: Mapping[str, float] = field(default_factory=dict)
    """items per step, by name: tokens, images."""
    flops: float = 0.0
    """the model's FLOPs per step, forward and backward; 0: unknown."""
    precision: Precision = "fp32"
    later_flops: float = 0.0
    """further FLOPs per step from `later_from` on, such as those of a discriminator that starts later."""
    later_from: int = 0
    """step (from 0) from which `later_flops` count."""

    def flops_of(self, step: int) -> float:
        """Return the model's FLOPs in a step (from 0)."""
        return self.flops + (self.later_flops if step >= self.later_from else 0.0)


class Clock:
    """Timer of training steps, without validations and checkpoints.

    The first step, in which kernels are chosen and compiled, counts only until there is a second one.
    """

    def __init__(self, effort: Effort, peak: float | None) -> None:
        """Take the work of a step, and the peak FLOP/s of all devices together (None: unknown)."""
        self.effort, self.peak = effort, peak
        self._steps, self._seconds, self._flops = 0, 0.0, 0.0

    @contextmanager
    def step(self, step: int = 0) -> Iterator[None]:
        """Time one step, whose number decides its FLOPs.

        A GPU may still be working when the block ends. The rest counts toward the next step's time, unless this block
        ends by fetching figures; then the total is exact.
        """
        began = time.perf_counter()
        yield
        if self._steps == 1:
            self._seconds = self._flops = 0.0
        self._seconds += time.perf_counter() - began
        self._flops += self.effort.flops_of(step)
        self._steps += 1

    def figures(self) -> dict[str, float]:
        """Return mean items and FLOPs per second over the steps so far, and `mfu`, the FLOPs' share of the peak."""
        if not self._seconds:
            return {}
        rate = max(self._steps - 1, 1) / self._seconds
        figures = {f"{name}_per_s": count * rate for name, count in self.effort.items.items()}
        if self.effort.flops:
            figures["model_flops_per_s"] = self._flops / self._seconds
        if self.effort.flops and self.peak is not None:
            figures["mfu"] = figures["model_flops_per_s"] / self.peak
        return figures


def peak_flops(device: str, precision: Precision, *, is_tf32: bool = False) -> float | None:
    """Return a device's peak FLOP/s in matrix products: from a table, or on CPUs by timing one.

    None for a GPU that is not in the table. A CPU's peak depends on torch's number of threads.
    """
    if torch.device(device).type == "cpu":
        return _timed_peak(torch.bfloat16 if precision == "bf16" else torch.float32)
    if torch.device(device).type == "cuda":
        return _listed_peak(torch.cuda.get_device_name(device), precision, is_tf32=is_tf32)
    return None


def _listed_peak(name: str, precision: Precision, *, is_tf32: bool = False) -> float | None:
    words = " ".join(re.split(r"[\s_-]+", name.upper()))
    for gpu, (half, single, tf32) in PEAKS.items():
        if re.search(rf"\b{gpu}\b", words):
            return (half if precision != "fp32" else tf32 if is_tf32 else single) * 1e12
    return None


def _timed_peak(dtype: torch.dtype) -> float:
    """Time several products on this CPU and return the highest FLOP/s."""
    a = torch.ones(SIDE, SIDE, dtype=dtype)  # not random, so that the state of torch's generator does not change
    times = []
    for _ in range(1 + ROUNDS):
        began = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - began)
    return 2 * SIDE**3 / min(times[1:])
