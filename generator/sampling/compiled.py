"""Compile functions for sampling, from networks whose weights no longer change."""

import inspect
import types
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

from infra.compute.compiler import check_compiler, keep_compiled
from infra.compute.regions import REPEATABLE

P = ParamSpec("P")
T = TypeVar("T")

# Torch 2.11 has no option that isolates graphs.
CAN_ISOLATE = "isolate_recompiles" in inspect.signature(torch.compile).parameters


def compiled(function: Callable[P, T], device: torch.device) -> Callable[P, T]:
    """Compile a function as one graph of static shapes; call it in inference mode.

    On CPUs, weights that it uses must not change or be shared: they become constants of the graph, packed for oneDNN,
    and no guard checks them. On CUDA, weights are inputs of the graph, so that layers with the same code and shapes
    share a graph. Graphs are not shared with other functions of the same code, of which a sweep compiles many.

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
        # Set globally, since tracing reads it before options are applied.
        with config.patch(freezing=True):
            return graph(*args, **kwargs)

    return frozen


def isolated(function: Callable[P, T], **settings: Any) -> Callable[P, T]:
    """Compile a function without graph breaks, for static shapes, with graphs of its own.

    Torch caches graphs by code object, which all functions defined by the same source line share: they would count
    toward one recompile limit and, without guards, use each other's graphs.
    """
    if CAN_ISOLATE:
        settings["isolate_recompiles"] = True
    else:
        function = _with_own_code(function)
    graph: Callable[P, T] = torch.compile(function, fullgraph=True, dynamic=False, **settings)
    return graph


def _with_own_code(function: Callable[P, T]) -> Callable[P, T]:
    """Return the same function or method with a copy of its code object."""
    if isinstance(function, types.MethodType):
        return types.MethodType(_with_own_code(function.__func__), function.__self__)
    assert isinstance(function, types.FunctionType)
    code = function.__code__.replace()
    twin = types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin
