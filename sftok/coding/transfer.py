"""The way of pixels to a GPU and of codes back, beside its work; where there is none, nothing is copied or waited for.

From pinned memory a GPU copies while the host goes on. torch keeps such memory until the copy is done, also where the
tensor is let go of before.
"""

from collections.abc import Callable

import torch
from torch import Tensor


class Lane:
    """The way to a device: what is sent is copied beside the work that is queued there."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.is_cuda = device, device.type == "cuda"
        self._copies = torch.cuda.Stream(device) if self.is_cuda else None

    def send(self, tensor: Tensor) -> Tensor:
        """The tensor on the device, for work that is queued from now on; from pinned memory, or it is there already."""
        if self._copies is None:
            return tensor.to(self.device)
        work, sent = torch.cuda.current_stream(self.device), tensor
        if not tensor.is_cuda:
            with torch.cuda.stream(self._copies):
                sent = tensor.to(self.device, non_blocking=True)
            work.wait_stream(self._copies)
        sent.record_stream(work)  # its memory belongs to another stream, and must last until the work is done
        return sent

    def fetch(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Begin to copy a result to the host; the call that is returned waits for it, and for nothing after it."""
        if not tensor.is_cuda:
            return lambda: tensor
        found = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        found.copy_(tensor, non_blocking=True)
        done = torch.cuda.Event(blocking=True)
        done.record(torch.cuda.current_stream(tensor.device))

        def wait() -> Tensor:
            done.synchronize()
            return found

        return wait
