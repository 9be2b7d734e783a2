"""Compiling networks, the compilers that it takes, and the folder that keeps what was compiled."""

import hashlib
import os
import platform
import shlex
import shutil
import sysconfig
from pathlib import Path

import torch
from torch import nn

from infra.compute.regions import compile_regions
from infra.settings import Settings

CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
"""Variables that say where torch and Triton keep what they compile."""


def compile_in_place(network: nn.Module) -> None:
    """Compile a network for the device that it is on; repeatably where deterministic algorithms were asked for.

    Raises:
        ValueError: a compiler is missing.
    """
    keep_compiled()
    check_compiler(next(network.parameters()).device)
    compile_regions(network, repeatable=torch.are_deterministic_algorithms_enabled())


def check_compiler(device: torch.device) -> None:
    """Refuse to compile without the compiler that a device takes, which would be found out at the first step.

    On CPUs torch writes C++; on CUDA Triton builds, with a C compiler, what launches its kernels.

    Raises:
        ValueError: with the remedy.
    """
    if device.type == "cuda":
        _check_c_compiler()
    if device.type != "cpu":
        return
    # Imported here: a second that only those who compile have to wait.
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        need = "compile = True needs a C++ compiler, and there is none"
        raise ValueError(f"{need}: install g++, or leave it False") from error


def _check_c_compiler() -> None:
    """Look where Triton looks: at CC, then for gcc or clang; and for Python's headers, which it includes."""
    asked = os.environ.get("CC")
    if asked is not None and shutil.which(asked) is None:
        raise ValueError(f"CC = {asked} is no program, and compile = True needs a C compiler: unset it, or correct it")
    if asked is None and not (shutil.which("gcc") or shutil.which("clang")):
        need = "compile = True on CUDA needs a C compiler, and there is none"
        raise ValueError(f"{need}: install gcc, or set compile = False")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        need = f"compile = True on CUDA needs Python's headers, and there is no {header}"
        raise ValueError(f"{need}: install python3-dev, or set compile = False")


def keep_compiled() -> None:
    """Let torch and Triton keep what they compile in one folder for all processes of this machine and its kind.

    Called before a process first compiles. A folder that the user has named is left as it is. Processors with other
    instructions have another folder, since code that was compiled for one may not run on the next. Where the home's
    path has blanks or quotes, torch keeps to its own folder: it calls its compiler without quoting.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    folder, torchs_own = Settings().home / "compiled" / _instructions(), default_cache_dir()
    if not _is_one_word(str(folder)):
        return
    for variable, name in zip(CACHES, ("inductor", "triton"), strict=True):
        # Torch sets them itself, to its own default, as soon as its compiler is imported.
        if os.environ.get(variable, torchs_own).startswith(torchs_own):
            os.environ[variable] = str(folder / name)


def _is_one_word(path: str) -> bool:
    try:
        return shlex.split(path) == [path]
    except ValueError:  # a quote that is not closed
        return False


def _instructions() -> str:
    """A name for what this machine's processor understands."""
    told = Path("/proc/cpuinfo")  # Linux
    lines = told.read_text().splitlines() if told.exists() else []
    flags = [line for line in lines if line.startswith(("flags", "Features"))]
    text = flags[0] if flags else platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
