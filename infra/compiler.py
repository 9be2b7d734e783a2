"""Compiling networks, and the C++ compiler that CPUs need for it."""

import torch
from torch import nn

from infra.regions import compile_regions


def compile_in_place(network: nn.Module) -> None:
    """Compile a network for the device that it is on.

    Raises:
        ValueError: it is on a CPU, and there is no C++ compiler.
    """
    check_compiler(next(network.parameters()).device)
    compile_regions(network)


def check_compiler(device: torch.device) -> None:
    """Refuse to compile for a CPU without a C++ compiler, which would be found out at the first step.

    Raises:
        ValueError: with the remedy.
    """
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
