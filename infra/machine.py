"""Describe this machine: CPU, usable cores, memory and GPUs."""

import os
import platform
import re
import sys
from functools import cache
from pathlib import Path


@cache
def _hardware() -> dict[str, str]:
    import psutil

    return {
        "cpu": _cpu_model(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1),
        "memory_gib": f"{psutil.virtual_memory().total / 2**30:.1f}",
        "gpus": ", ".join(gpu_names()) or "none",
    }


def hardware() -> dict[str, str]:
    """Return this machine's CPU model, usable cores, memory in GiB and GPU names."""
    return dict(_hardware())


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def gpu_names() -> list[str]:
    """Return the names of this machine's GPUs from the driver's files; asking CUDA would occupy memory on the cards.

    If the driver has no such files, torch is asked, but only if it is already loaded: importing it takes seconds.
    """
    names = []
    for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        found = re.search(r"^Model:\s*(.+)$", file.read_text(errors="replace"), re.MULTILINE)
        names += [found[1].strip()] if found else []
    torch = sys.modules.get("torch")
    if names or torch is None:
        return names
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
