"""Copy pixels to a GPU and codes back concurrently with its work; without a GPU, nothing is copied or waited for.

A GPU copies from pinned memory asynchronously. torch keeps such memory until the copy is done, even if the tensor is
freed before.
"""

from collections.abc import Callable

import torch
from torch import Tensor


class DeviceTransfer:
    """Copies to and from a device, concurrently with the work that is queued there."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.is_cuda = device, device.type == "cuda"
        self._copies = torch.cuda.Stream(device) if self.is_cuda else None

    def send(self, tensor: Tensor) -> Tensor:
        """Copy a tensor in pinned memory, or on the device already, to the device, for work queued from now on."""
        if self._copies is None:
            return tensor.to(self.device)
        work, sent = torch.cuda.current_stream(self.device), tensor
        if not tensor.is_cuda:
            with torch.cuda.stream(self._copies):
                sent = tensor.to(self.device, non_blocking=True)
            work.wait_stream(self._copies)
        sent.record_stream(work)  # its memory belongs to another stream, and must not be reused before the work is done
        return sent

    def fetch(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Begin to copy a result to the host; the returned function waits for it, but for no later work."""
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
