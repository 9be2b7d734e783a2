"""Sending tensors to a GPU and figures back, so that the host waits as seldom as can be."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def pinned(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A CPU tensor where it can be copied to `device` while the host goes on: in pinned memory, for CUDA."""
    return tensor.pin_memory() if torch.device(device).type == "cuda" else tensor


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A CPU tensor on `device`; the host goes on while it is copied."""
    # Pinned memory is the caching allocator's: it is not handed out again before the copy has been made.
    return pinned(tensor, device).to(device, non_blocking=True)


def fetch(figures: Mapping[str, Tensor | float], beside: Sequence[Tensor] = ()) -> tuple[dict[str, float], list[float]]:
    """Scalar figures, and the values of float64 tensors beside them, in one copy: the host waits once."""
    names = [name for name, value in figures.items() if isinstance(value, Tensor)]
    scalars = [value.detach().double().reshape(1) for value in figures.values() if isinstance(value, Tensor)]
    values = torch.cat([*scalars, *beside]).tolist() if scalars or beside else []
    fetched = dict(zip(names, values, strict=False))
    return {name: fetched[name] if name in fetched else float(v) for name, v in figures.items()}, values[len(names) :]
