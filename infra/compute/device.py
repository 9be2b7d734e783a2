"""Where numbers are computed and how: the one place that chooses devices and sets torch's numeric switches."""

import gc
import os
import platform
import re
import sys
from typing import Literal

from pydantic import Field

from infra.config import Config
from infra.provenance import gpu_names

DeviceChoice = Literal["auto", "cpu", "cuda"]
CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
# GPUs of before compute capability 8.0, by name: asking CUDA would take memory of the card.
WITHOUT_BF16 = re.compile(r"\b(?:[KMPT]\d{1,4}G?|G?V100S?|GTX|TITAN|Quadro RTX|RTX 20\d\d)\b")


class NumericsConfig(Config):
    """How a GPU computes in floating point; CPUs compute in IEEE arithmetic and repeat themselves anyway."""

    fp32: Literal["ieee", "tf32"] = Field(
        "ieee", description="products and convolutions of float32 on CUDA: ieee, or tf32, which keeps 10 bits of 23"
    )
    cudnn_benchmark: bool = Field(
        False,
        description="let cuDNN time its convolutions and take the fastest; two processes may choose differently, and "
        "then round differently",
    )
    deterministic: bool = Field(
        False,
        description="choose deterministic algorithms on CUDA, so that a run repeats bit by bit on the same kind of "
        "device; slower, and what has no such algorithm is named in a warning",
    )


IEEE = NumericsConfig()


def default_device() -> str:
    """Choose cuda if this process may use a GPU, else cpu."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def default_precision(device: str) -> Literal["fp32", "bf16"]:
    """Choose the precision of what is left open: bf16 on CUDA, but fp32 on GPUs of before it, and on CPUs."""
    if not device.startswith("cuda") or any(WITHOUT_BF16.search(name) for name in gpu_names()):
        return "fp32"
    return "bf16"


def use_numerics(numerics: NumericsConfig, device: str) -> None:
    """Set torch's numeric switches for this process: where a worker or a training begins, before it computes."""
    import torch

    if torch.device(device).type != "cuda":
        return
    is_tf32 = numerics.fp32 == "tf32"
    # The older of torch's two ways, which sets both; the newer one leaves the older unreadable, and Dynamo reads it.
    torch.backends.cuda.matmul.allow_tf32 = is_tf32
    torch.backends.cudnn.allow_tf32 = is_tf32
    torch.backends.cudnn.benchmark = numerics.cudnn_benchmark and not numerics.deterministic
    torch.backends.cudnn.deterministic = numerics.deterministic
    if numerics.deterministic:
        os.environ.setdefault(CUBLAS_WORKSPACE, ":4096:8")  # read when cuBLAS is first used
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a property
    torch.use_deterministic_algorithms(numerics.deterministic, warn_only=True)
    # Gradients of fused attention are added up in any order as long as torch is to warn only; and were it to refuse,
    # poolings without overlaps would be refused too, which repeat themselves in fact.
    torch.backends.cuda.enable_flash_sdp(not numerics.deterministic)
    torch.backends.cuda.enable_mem_efficient_sdp(not numerics.deterministic)
    torch.backends.cuda.enable_cudnn_sdp(not numerics.deterministic)


def release_memory() -> None:
    """Give memory of GPUs that this process has cached back to them, for the processes that come next."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def device_kind(device: str) -> str:
    """Name the kind of a device, such as "cuda sm90x132" or "cpu avx512": within one, the same work should repeat.

    GPUs are told apart by compute capability and number of multiprocessors, by which cuBLAS and torch divide sums; CPUs
    by the instructions that torch and oneDNN choose kernels by, with the limits that ATEN_CPU_CAPABILITY and
    ONEDNN_MAX_CPU_ISA set.
    """
    import torch

    if torch.device(device).type == "cuda":
        found = torch.cuda.get_device_properties(device)
        return f"cuda sm{found.major}{found.minor}x{found.multi_processor_count}"
    return f"cpu {cpu_features()}"


def cpu_features() -> str:
    """Name the instruction set that this CPU's kernels are chosen by: avx2, avx512, avx512+bf16, avx512+amx ..."""
    import torch

    found = torch.backends.cpu.get_cpu_capability().lower()
    if found == "default":
        found = platform.machine().lower()
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "").lower()
    if limit and limit not in ("all", "default"):
        return found if limit == found else f"{found}, oneDNN {limit}"
    for name, probe in (("amx", "_is_amx_tile_supported"), ("bf16", "_is_avx512_bf16_supported")):
        if found == "avx512" and getattr(torch.cpu, probe, bool)():
            return f"{found}+{name}"
    return found


def device_facts(device: str, numerics: NumericsConfig) -> dict[str, str]:
    """What a manifest says of where and how an artifact was computed: device, kind, libraries, arithmetic."""
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
