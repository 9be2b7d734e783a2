"""Copy tensors to a GPU and figures back with as few host synchronizations as possible."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def pinned(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return a CPU tensor from which copies to `device` are asynchronous: in pinned memory, for CUDA."""
    return tensor.pin_memory() if torch.device(device).type == "cuda" else tensor


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy a CPU tensor to `device` asynchronously."""
    # Pinned memory belongs to the caching allocator, which does not reuse it before the copy is complete.
    return pinned(tensor, device).to(device, non_blocking=True)


def fetch(figures: Mapping[str, Tensor | float], beside: Sequence[Tensor] = ()) -> tuple[dict[str, float], list[float]]:
    """Fetch scalar figures, and the values of float64 tensors beside them, in one copy: the host waits once."""
    names = [name for name, value in figures.items() if isinstance(value, Tensor)]
    scalars = [value.detach().double().reshape(1) for value in figures.values() if isinstance(value, Tensor)]
    values = torch.cat([*scalars, *beside]).tolist() if scalars or beside else []
    fetched = dict(zip(names, values, strict=False))
    return {name: fetched[name] if name in fetched else float(v) for name, v in figures.items()}, values[len(names) :]
