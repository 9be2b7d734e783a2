"""Copy the state of a training into memory, from where it is written while training goes on."""

from collections.abc import Mapping

import torch
from torch import Tensor

from infra.training.parallel import own_part

ALIGNMENT = 64  # bytes


class Staging:
    """Copies of tensors on the CPU, in one buffer that is reused; pinned if the tensors are on CUDA."""

    def __init__(self) -> None:
        self._layout: list[tuple[str, torch.Size, torch.dtype]] = []
        self._copies: dict[str, Tensor] = {}

    @torch.no_grad()
    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy tensors, of a DTensor the local part; the copies of the last call are overwritten."""
        local = {name: own_part(tensor).detach() for name, tensor in tensors.items()}
        is_cuda = any(tensor.is_cuda for tensor in local.values())
        layout = [(name, tensor.shape, tensor.dtype) for name, tensor in local.items()]
        if layout != self._layout:
            self._copies = {}  # freed before the next ones are allocated
            self._layout, self._copies = layout, _allocate(local, is_pinned=is_cuda)
        for name, tensor in local.items():
            self._copies[name].copy_(tensor, non_blocking=True)
        if is_cuda:
            torch.cuda.current_stream().synchronize()
        return self._copies


def share_out(tensors: Mapping[str, Tensor], rank: int, size: int) -> list[str]:
    """Return the names that a rank writes: all sharded tensors, and its share of those that all ranks have."""
    whole = {name for name, tensor in tensors.items() if own_part(tensor) is tensor}
    names = [name for name in tensors if name not in whole]
    loads = [0] * size
    for name in sorted(whole, key=lambda name: (-tensors[name].nbytes, name)):
        least = loads.index(min(loads))
        loads[least] += tensors[name].nbytes + 1
        if least == rank:
            names.append(name)
    return names


def _allocate(tensors: Mapping[str, Tensor], *, is_pinned: bool) -> dict[str, Tensor]:
    starts, end = {}, 0
    for name, tensor in tensors.items():
        starts[name] = end
        end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    # One allocation: that of pinned memory is rounded up to a power of two.
    buffer = torch.empty(end, dtype=torch.uint8, pin_memory=is_pinned)
    return {
        name: buffer[start : start + tensors[name].nbytes].view(tensors[name].dtype).view(tensors[name].shape)
        for name, start in starts.items()
    }
