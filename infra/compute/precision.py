"""Measure the speed of a precision relative to fp32: without native instructions, half precision is slower."""

import functools
import time

import torch

from infra.compute.device import cpu_features
from infra.config import Precision

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIDE = 192  # of the timed product; small, since some CPUs reach only half a GFLOP/s in bfloat16
ROUNDS = 3


@functools.cache
def precision_ratio(precision: Precision) -> float:
    """Measure this CPU's matrix-product speed in a precision relative to fp32.

    Measured once per process, in a tenth of a second, by a single thread's processor time, so that other load on the
    machine matters little.
    """
    # Not random, so that the state of torch's generator does not change.
    half, single = (torch.ones(SIDE, SIDE, dtype=DTYPES[each]) for each in (precision, "fp32"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        taken = [(_seconds(half), _seconds(single)) for _ in range(1 + ROUNDS)]
    finally:
        torch.set_num_threads(threads)
    half_times, single_times = zip(*taken[1:], strict=True)  # the first round creates the kernels
    ratio: float = min(single_times) / min(half_times)
    return ratio


def slow_because(precision: Precision, device: str) -> str | None:
    """Explain, as part of a sentence, why a precision is no faster than fp32 on a device; None if it is faster.

    GPUs are judged by their model: timing would occupy memory on a card that other processes may need.
    """
    if precision == "fp32":
        return None
    if torch.device(device).type == "cuda":
        if precision == "fp16" or torch.cuda.get_device_capability(device) >= (8, 0):
            return None
        return f"{torch.cuda.get_device_name(device)} has no {precision} instructions"
    ratio = precision_ratio(precision)
    if ratio >= 1:
        return None
    return f"{precision} products run at {ratio:.2g} times the speed of fp32 on this CPU ({cpu_features()})"


def _seconds(a: torch.Tensor) -> float:
    began = time.thread_time()
    a @ a
    return time.thread_time() - began
