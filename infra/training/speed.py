"""How fast a training runs: items and model operations a second, and the share of what the device could do at best."""

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from infra.config import Precision

# Dense TFLOP/s in half precision, in single precision, and in single precision by TF32 where the GPU has it, from the
# vendor's data sheets (which double what tensor cores do where they mean sparse products).
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
SIDE = 768  # of the product that is timed on a CPU
ROUNDS = 3


@dataclass(frozen=True)
class Effort:
    """What one step is, over all ranks."""

    items: Mapping[str, float] = field(default_factory=dict)
    """what it sees, by name: tokens, images."""
    flops: float = 0.0
    """the model's operations, forward and backward; 0: not known."""
    precision: Precision = "fp32"
    later_flops: float = 0.0
    """what is added from a later step on, as where a discriminator joins."""
    later_from: int = 0
    """that step."""

    def flops_of(self, step: int) -> float:
        """The model's operations in a step (from 0)."""
        return self.flops + (self.later_flops if step >= self.later_from else 0.0)


class Clock:
    """Adds up the time of steps alone, without validations and checkpoints.

    The first step, in which kernels are chosen and compiled, counts only as long as there is no other.
    """

    def __init__(self, effort: Effort, peak: float | None) -> None:
        """Take what a step is, and the operations a second that all devices together could do (None: not known)."""
        self.effort, self.peak = effort, peak
        self._steps, self._seconds, self._flops = 0, 0.0, 0.0

    @contextmanager
    def step(self, step: int = 0) -> Iterator[None]:
        """Time one step, whose number decides its operations.

        A GPU may still be at work when it ends. What is left is part of the next step's time, or of this one's if it
        ended with fetching figures: then the sum is what the steps took.
        """
        began = time.perf_counter()
        yield
        if self._steps == 1:
            self._seconds = self._flops = 0.0
        self._seconds += time.perf_counter() - began
        self._flops += self.effort.flops_of(step)
        self._steps += 1

    def figures(self) -> dict[str, float]:
        """Items and operations a second, the mean of the steps so far, and `mfu`, their share of the peak."""
        if not self._seconds:
            return {}
        rate = max(self._steps - 1, 1) / self._seconds
        found = {f"{name}_per_s": count * rate for name, count in self.effort.items.items()}
        if self.effort.flops:
            found["model_flops_per_s"] = self._flops / self._seconds
        if self.effort.flops and self.peak is not None:
            found["mfu"] = found["model_flops_per_s"] / self.peak
        return found


def peak_flops(device: str, precision: Precision, *, is_tf32: bool = False) -> float | None:
    """Operations a second that a device could do in matrix products: from a table, or on CPUs from one that is timed.

    None for a GPU that the table does not have. A CPU's depends on torch's number of threads.
    """
    if torch.device(device).type == "cpu":
        return _timed(torch.bfloat16 if precision == "bf16" else torch.float32)
    if torch.device(device).type == "cuda":
        return _known(torch.cuda.get_device_name(device), precision, is_tf32=is_tf32)
    return None


def _known(name: str, precision: Precision, *, is_tf32: bool = False) -> float | None:
    words = " ".join(re.split(r"[\s_-]+", name.upper()))
    for gpu, (half, single, tf32) in PEAKS.items():
        if re.search(rf"\b{gpu}\b", words):
            return (half if precision != "fp32" else tf32 if is_tf32 else single) * 1e12
    return None


def _timed(dtype: torch.dtype) -> float:
    """The best of some products on this CPU."""
    a = torch.ones(SIDE, SIDE, dtype=dtype)  # not random: the state of torch's generator stays as it is
    times = []
    for _ in range(1 + ROUNDS):
        began = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - began)
    return 2 * SIDE**3 / min(times[1:])
