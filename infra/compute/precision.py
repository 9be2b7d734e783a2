"""How fast a device multiplies in a precision, beside fp32: without instructions for it, slower and not faster."""

import functools
import time

import torch

from infra.compute.device import cpu_features
from infra.config import Precision

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIDE = 192  # of the product that is timed: some CPUs do half a GFLOP/s in bfloat16
ROUNDS = 3


@functools.cache
def precision_ratio(precision: Precision) -> float:
    """How many times as fast as in fp32 this CPU multiplies in a precision.

    Tried once a process, in a tenth of a second, by the processor time of a single thread: what else the machine does
    matters little.
    """
    # Not random: the state of torch's generator stays as it is.
    half, single = (torch.ones(SIDE, SIDE, dtype=DTYPES[each]) for each in (precision, "fp32"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        taken = [(_seconds(half), _seconds(single)) for _ in range(1 + ROUNDS)]
    finally:
        torch.set_num_threads(threads)
    ours, beside = zip(*taken[1:], strict=True)  # kernels are made at the first use
    ratio: float = min(beside) / min(ours)
    return ratio


def slow_because(precision: Precision, device: str) -> str | None:
    """Why fp32 is no slower on a device than a precision, as part of a sentence; None where the precision pays.

    GPUs are judged by what they are: timing would take memory of a card that other processes are to use.
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
