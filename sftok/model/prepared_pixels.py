"""The pixel decoder prepared for inference: cast to a type and a memory layout, compiled or not."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infra.compute.compiler import check_compiler

# Images per pass on CUDA: at 256 x 256 a bfloat16 map of 128 channels takes 1 GB, and some four are in memory.
AT_ONCE = 64


class PreparedPixels:
    """Grids of code vectors to images; holds the weights as they were when it was made."""

    def __init__(self, network: nn.Module, dtype: torch.dtype, device: torch.device, *, compile: bool = False) -> None:
        """Copy the weights, and with `compile` compile the network, for batches of one size.

        Raises:
            ValueError: a compiler is missing.
        """
        is_cuda = device.type == "cuda"
        self.dtype, self.at_once = dtype, AT_ONCE if is_cuda else None
        # Convolutions compute in channels last. On eager CUDA, however, group norms convert their input, and the next
        # convolution has to convert it back; compiled ones take either layout.
        self.layout = torch.contiguous_format if is_cuda and not compile else torch.channels_last
        self.network = copy.deepcopy(network).requires_grad_(False).to(dtype=dtype).to(memory_format=self.layout)
        if compile:
            check_compiler(device)
            self.network.compile(dynamic=False)

    def __call__(self, grids_BChw: Tensor) -> Tensor:
        """Float32 (B, C, h, w) to float32 RGB in [0, 1], (B, 3, H, W)."""
        count = len(grids_BChw)
        parts = 1 if self.at_once is None else -(-count // self.at_once)
        size = -(-count // parts)
        # All passes have one size, since each size would be compiled anew and round differently.
        given = F.pad(grids_BChw, (0, 0, 0, 0, 0, 0, 0, parts * size - count)) if parts * size > count else grids_BChw
        made = [self.network(part.to(self.dtype, memory_format=self.layout)) for part in given.split(size)]
        return torch.cat([images.float().clamp(0, 1) for images in made])[:count]
