"""Compiling a network by its repeated blocks: each kind of block is compiled once, whatever their number.

A whole network takes minutes, its blocks seconds, and what stands between them is little of the time. Shapes are
static: batches of a training are of one size.
"""

from collections.abc import Iterator

from torch import nn

GRAPHS = 64  # of one piece of code: blocks of other widths and sides, with and without gradients
REPEATABLE = {"deterministic": True}
"""Options of torch's compiler by which sums on a GPU are not divided as one process happened to time them fastest."""


def compile_regions(network: nn.Module, *, repeatable: bool) -> None:
    """Compile the blocks of a network in place, or all of it where it has none.

    Args:
        network: whose blocks are compiled.
        repeatable: whether other processes, on devices of the same kind, must compute the same numbers.
    """
    import torch._dynamo.config as dynamo

    dynamo.recompile_limit = max(dynamo.recompile_limit, GRAPHS)
    for block in list(blocks(network)) or [network]:
        block.compile(dynamic=False, options=dict(REPEATABLE) if repeatable else None)


def blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The members of a network's lists and sequences that are networks themselves; not what lies within those."""
    is_list = isinstance(network, (nn.ModuleList, nn.Sequential))
    for child in network.children():
        if isinstance(child, (nn.ModuleList, nn.Sequential)) or not is_list:
            yield from blocks(child)
        elif any(True for _ in child.children()):
            yield child
