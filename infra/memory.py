"""Memory that runs out: said in one line, with what to lower."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_memory(remedy: str, error: type[Exception] = ValueError) -> Iterator[None]:
    """Within the block, memory that ran out is raised as `error`, in one line that ends in the remedy."""
    try:
        yield
    except (MemoryError, RuntimeError) as found:  # of torch, CUDA's is a class of its own and the CPU's a message
        is_full = isinstance(found, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(found)
        if not is_full:
            raise
        said = " ".join(str(found).split())[:200] or type(found).__name__
        raise error(f"memory ran out ({said}); {remedy}") from found
