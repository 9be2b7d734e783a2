"""Compile networks, check for the compilers this needs, and cache what was compiled."""

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
"""Variables that name the folders in which torch and Triton cache what they compile."""


def compile_in_place(network: nn.Module) -> None:
    """Compile a network for the device it is on; repeatably if deterministic algorithms are enabled.

    Raises:
        ValueError: a compiler is missing.
    """
    keep_compiled()
    check_compiler(next(network.parameters()).device)
    compile_regions(network, repeatable=torch.are_deterministic_algorithms_enabled())


def check_compiler(device: torch.device) -> None:
    """Check that the compiler needed for a device exists, which would otherwise only fail at the first step.

    On CPUs torch generates C++; on CUDA Triton builds its kernel launchers with a C compiler.

    Raises:
        ValueError: the compiler is missing; states the remedy.
    """
    if device.type == "cuda":
        _check_c_compiler()
    if device.type != "cpu":
        return
    # Imported here, since it takes a second that only those who compile should wait.
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        need = "compile = True needs a C++ compiler, and there is none"
        raise ValueError(f"{need}: install g++, or leave it False") from error


def _check_c_compiler() -> None:
    """Check for a C compiler where Triton looks (CC, gcc, clang), and for Python's headers, which it includes."""
    asked = os.environ.get("CC")
    if asked is not None and shutil.which(asked) is None:
        raise ValueError(f"CC = {asked} is not a program, and compile = True needs a C compiler: unset or correct it")
    if asked is None and not (shutil.which("gcc") or shutil.which("clang")):
        need = "compile = True on CUDA needs a C compiler, and there is none"
        raise ValueError(f"{need}: install gcc, or set compile = False")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        need = f"compile = True on CUDA needs Python's headers, and there is no {header}"
        raise ValueError(f"{need}: install python3-dev, or set compile = False")


def keep_compiled() -> None:
    """Make torch and Triton cache compiled code in one folder, shared by all processes on machines of this kind.

    Call it before a process first compiles. A folder that the user has set is kept. Processors with other instruction
    sets have other folders, since code compiled for one may not run on another. If the home's path contains blanks or
    quotes, torch's own default is kept, because torch calls its compiler without quoting.
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
    except ValueError:  # an unclosed quote
        return False


def _instructions() -> str:
    """Name the instruction set of this machine's processor."""
    cpuinfo = Path("/proc/cpuinfo")  # Linux
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    flags = [line for line in lines if line.startswith(("flags", "Features"))]
    text = flags[0] if flags else platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
