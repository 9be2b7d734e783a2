"""Memory that runs out: said in one line, with what to lower."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Besides classes of their own: of the CPU; of CUDA beside torch's allocator or in a compiler's error; of cuBLAS, cuDNN.
FULL = ("can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED")


@contextmanager
def full_memory(remedy: str, error: type[Exception] = ValueError) -> Iterator[None]:
    """Within the block, memory that ran out is raised as `error`, in one line that ends in the remedy."""
    try:
        yield
    except (MemoryError, RuntimeError) as found:
        is_full = isinstance(found, (MemoryError, torch.OutOfMemoryError)) or any(text in str(found) for text in FULL)
        if not is_full:
            raise
        said = " ".join(str(found).split())[:200] or type(found).__name__
        raise error(f"memory ran out ({said}); {remedy}") from found
