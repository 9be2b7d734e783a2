"""Find devices and set torch's numerics; `flows.requests.choose_device` chooses for a run."""

import gc
import os
import platform
import re
import subprocess
import sys
from typing import Literal

from pydantic import Field

from infra.config import Config
from infra.machine import gpu_names

DeviceChoice = Literal["auto", "cpu", "cuda"]
CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
ASK_MEMORY = (
    "import torch; print(*(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())))"
)
# GPUs below compute capability 8.0, by name: asking CUDA would occupy memory on the card.
WITHOUT_BF16 = re.compile(r"\b(?:[KMPT]\d{1,4}G?|G?V100S?|GTX|TITAN|Quadro RTX|RTX 20\d\d)\b")


class NumericsConfig(Config):
    """Floating-point settings of GPUs; CPUs always use IEEE arithmetic and are deterministic."""

    fp32: Literal["ieee", "tf32"] = Field(
        "ieee",
        description="float32 matrix products and convolutions on CUDA: ieee, or tf32 with 10 mantissa bits of 23",
    )
    cudnn_benchmark: bool = Field(
        False,
        description="let cuDNN benchmark its convolutions and use the fastest; two processes may choose differently, "
        "and then round differently",
    )
    deterministic: bool = Field(
        False,
        description="use deterministic algorithms on CUDA, so that a run is bitwise reproducible on the same kind of "
        "device; slower, and operations without such an algorithm are named in a warning",
    )


IEEE = NumericsConfig()


def default_device() -> str:
    """Return cuda if this process may use a GPU, else cpu."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def gpu_memory() -> int | None:
    """Return the bytes of the smallest GPU that this process may use; None if there is none, or it cannot be asked.

    Another process asks, since asking occupies memory on the cards as long as the process lasts.
    """
    if default_device() != "cuda":
        return None
    asked = subprocess.run([sys.executable, "-c", ASK_MEMORY], capture_output=True, text=True, check=False)
    sizes = [int(word) for word in asked.stdout.split() if word.isdigit()]
    return min(sizes, default=None)


def default_precision(device: str) -> Literal["fp32", "bf16"]:
    """Return the default precision: bf16 on CUDA, fp32 on CPUs and on GPUs without bf16."""
    if not device.startswith("cuda") or any(WITHOUT_BF16.search(name) for name in gpu_names()):
        return "fp32"
    return "bf16"


def use_numerics(numerics: NumericsConfig, device: str) -> None:
    """Set torch's numerics for this process; call it when a worker or a training starts, before it computes."""
    import torch

    if torch.device(device).type != "cuda":
        return
    is_tf32 = numerics.fp32 == "tf32"
    # torch's older API, which sets both; after the newer one the older cannot be read, and Dynamo reads it.
    torch.backends.cuda.matmul.allow_tf32 = is_tf32
    torch.backends.cudnn.allow_tf32 = is_tf32
    torch.backends.cudnn.benchmark = numerics.cudnn_benchmark and not numerics.deterministic
    torch.backends.cudnn.deterministic = numerics.deterministic
    if numerics.deterministic:
        os.environ.setdefault(CUBLAS_WORKSPACE, ":4096:8")  # read when cuBLAS is first used
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a property
    torch.use_deterministic_algorithms(numerics.deterministic, warn_only=True)
    # While torch only warns, fused attention sums its gradients in arbitrary order, so it is disabled here. Raising
    # instead of warning would also reject non-overlapping pooling, which is in fact deterministic.
    torch.backends.cuda.enable_flash_sdp(not numerics.deterministic)
    torch.backends.cuda.enable_mem_efficient_sdp(not numerics.deterministic)
    torch.backends.cuda.enable_cudnn_sdp(not numerics.deterministic)


def release_memory() -> None:
    """Return this process's cached GPU memory to the device, for the processes that follow."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def device_kind(device: str) -> str:
    """Name the kind of a device, such as "cuda sm90x132" or "cpu avx512"; within one kind results should be identical.

    GPUs are distinguished by compute capability and number of multiprocessors, which decide how cuBLAS and torch split
    sums; CPUs by the instruction set by which torch and oneDNN choose kernels, within the limits set by
    ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA.
    """
    import torch

    if torch.device(device).type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        return f"cuda sm{gpu.major}{gpu.minor}x{gpu.multi_processor_count}"
    return f"cpu {cpu_features()}"


def cpu_features() -> str:
    """Name the instruction set that this CPU's kernels are chosen by: avx2, avx512, avx512+bf16, avx512+amx ..."""
    import torch

    capability = torch.backends.cpu.get_cpu_capability().lower()
    if capability == "default":
        capability = platform.machine().lower()
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "").lower()
    if limit and limit not in ("all", "default"):
        return capability if limit == capability else f"{capability}, oneDNN {limit}"
    for name, probe in (("amx", "_is_amx_tile_supported"), ("bf16", "_is_avx512_bf16_supported")):
        if capability == "avx512" and getattr(torch.cpu, probe, bool)():
            return f"{capability}+{name}"
    return capability


def device_facts(device: str, numerics: NumericsConfig) -> dict[str, str]:
    """Describe for a manifest where and how an artifact was computed: device, kind, libraries, numerics."""
    import torch

    facts = {"kind": device_kind(device), "torch": torch.__version__}
    if torch.device(device).type != "cuda":
        return facts
    return {
        **facts,
        "device": torch.cuda.get_device_name(device),
        "cuda": torch.version.cuda or "none",
        "cudnn": str(torch.backends.cudnn.version()),
        "fp32": numerics.fp32,
        "cudnn_benchmark": str(numerics.cudnn_benchmark and not numerics.deterministic).lower(),
        "deterministic": str(numerics.deterministic).lower(),
    }
