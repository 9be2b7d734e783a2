"""Compilation for sampling: functions of networks whose weights never change again."""

import inspect
import types
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

from infra.compute.compiler import check_compiler, keep_compiled
from infra.compute.regions import REPEATABLE

P = ParamSpec("P")
T = TypeVar("T")

# Torch 2.11 does not know how to keep graphs apart.
CAN_ISOLATE = "isolate_recompiles" in inspect.signature(torch.compile).parameters


def compiled(function: Callable[P, T], device: torch.device) -> Callable[P, T]:
    """Compile a function as one graph of static shapes; call it in inference mode.

    On CPUs, weights that it reaches must be its own and stay as they are: they become constants of the graph, laid out
    for oneDNN, and no call looks whether they have changed. On CUDA, weights that it reaches are inputs of the graph,
    so that layers with the same code and shapes share one. Graphs are not shared with other functions of the same
    code, of which a sweep compiles many.

    Raises:
        ValueError: a compiler is missing.
    """
    keep_compiled()
    check_compiler(device)
    if device.type != "cpu":
        return isolated(function, options=dict(REPEATABLE))
    graph = isolated(function, options={"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe})
    from torch._inductor import config

    def frozen(*args: P.args, **kwargs: P.kwargs) -> T:
        # The global setting, since tracing looks at it before any options are.
        with config.patch(freezing=True):
            return graph(*args, **kwargs)

    return frozen


def isolated(function: Callable[P, T], **settings: Any) -> Callable[P, T]:
    """Compile a function without breaks and for static shapes, with graphs of its own.

    Torch keeps graphs with a function's code, which every function that one line of source defines shares: they would
    be counted, and without guards be taken, for each other's.
    """
    if CAN_ISOLATE:
        settings["isolate_recompiles"] = True
    else:
        function = _with_own_code(function)
    graph: Callable[P, T] = torch.compile(function, fullgraph=True, dynamic=False, **settings)
    return graph


def _with_own_code(function: Callable[P, T]) -> Callable[P, T]:
    """The same function or method with a copy of its code."""
    if isinstance(function, types.MethodType):
        return types.MethodType(_with_own_code(function.__func__), function.__self__)
    assert isinstance(function, types.FunctionType)
    code = function.__code__.replace()
    twin = types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin
