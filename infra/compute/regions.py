"""Compile a network by its repeated blocks (regional compilation): each kind of block is compiled once.

Compiling a whole network takes minutes, its blocks seconds, and little of the run time is spent outside of them.
Shapes are static, since all batches of a training have one size.
"""

from collections.abc import Iterator

from torch import nn

GRAPHS = 64  # per piece of code: blocks of several widths and sides, with and without gradients
REPEATABLE = {"deterministic": True}
"""Options of torch's compiler that keep autotuning from choosing how sums on a GPU are split, which varies by run."""


def compile_regions(network: nn.Module, *, repeatable: bool) -> None:
    """Compile the blocks of a network in place, or the whole network if it has none.

    Args:
        network: the network whose blocks are compiled.
        repeatable: whether other processes, on devices of the same kind, must compute the same numbers.
    """
    import torch._dynamo.config as dynamo

    dynamo.recompile_limit = max(dynamo.recompile_limit, GRAPHS)
    for block in list(blocks(network)) or [network]:
        block.compile(dynamic=False, options=dict(REPEATABLE) if repeatable else None)


def blocks(network: nn.Module) -> Iterator[nn.Module]:
    """Yield the members of a network's module lists and sequences that have submodules; does not descend into them."""
    is_list = isinstance(network, (nn.ModuleList, nn.Sequential))
    for child in network.children():
        if isinstance(child, (nn.ModuleList, nn.Sequential)) or not is_list:
            yield from blocks(child)
        elif any(True for _ in child.children()):
            yield child
