"""Report out-of-memory errors in one line, with the setting to lower."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Messages without an error class of their own: of the CPU; of CUDA outside torch's allocator or within a compiler's
# error; of cuBLAS and cuDNN.
FULL = ("can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED")


@contextmanager
def reraise_out_of_memory(remedy: str, error: type[Exception] = ValueError) -> Iterator[None]:
    """Re-raise out-of-memory errors within the block as `error`, in one line that ends in the remedy."""
    try:
        yield
    except (MemoryError, RuntimeError) as cause:
        is_full = isinstance(cause, (MemoryError, torch.OutOfMemoryError)) or any(text in str(cause) for text in FULL)
        if not is_full:
            raise
        message = " ".join(str(cause).split())[:200] or type(cause).__name__
        raise error(f"memory ran out ({message}); {remedy}") from cause
