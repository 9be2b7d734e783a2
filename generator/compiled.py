"""Compilation for sampling: functions of networks whose weights never change again."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from infra.compiler import check_compiler

P = ParamSpec("P")
T = TypeVar("T")


def compiled(function: Callable[P, T], device: torch.device) -> Callable[P, T]:
    """Compile a function as one graph of static shapes; call it in inference mode.

    Weights that it reaches must be its own and stay as they are: on CPUs they become constants of the graph, laid out
    for oneDNN, and no call looks whether they have changed. Graphs are not shared with other functions of the same
    code, of which a sweep compiles many.

    Raises:
        ValueError: there is no C++ compiler, which CPUs need.
    """
    options = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    graph: Callable[P, T] = torch.compile(  # type: ignore[call-overload]  # its overloads lack isolate_recompiles
        function, fullgraph=True, dynamic=False, isolate_recompiles=True, options=options
    )
    if device.type != "cpu":
        return graph
    check_compiler(device)
    from torch._inductor import config

    def frozen(*args: P.args, **kwargs: P.kwargs) -> T:
        # The global setting, since tracing looks at it before any options are.
        with config.patch(freezing=True):
            return graph(*args, **kwargs)

    return frozen
