"""The teacher, a MaskGIT-VQGAN, whose codes are the proxy codes that the decoder predicts (method.md 1.2).

Shapes: B images, C channels, h x w the latent grid, P = h * w proxy positions, V proxy codes.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sftok.config import TeacherConfig

EPSILON = 1e-6


def norm(channels: int, config: TeacherConfig) -> nn.GroupNorm:
    """Make a group norm with the teacher's number of groups."""
    return nn.GroupNorm(config.norm_groups, channels, eps=EPSILON)


class ResBlock(nn.Module):
    """Norm, SiLU, 3x3 convolution, twice, with a skip connection."""

    def __init__(self, inputs: int, outputs: int, config: TeacherConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(inputs, config), norm(outputs, config)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.nin_shortcut = nn.Conv2d(outputs, outputs, 1, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, h, w) to (B, outputs, h, w)."""
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        # Where the width changes, the published network adds a projection of the block's own output, not of its
        # input, and was trained that way.
        return y + (x if self.nin_shortcut is None else self.nin_shortcut(y))


class TeacherEncoder(nn.Module):
    """Image to latent grid, halving the side between levels."""

    def __init__(self, config: TeacherConfig) -> None:
        super().__init__()
        widths = [config.base_channels * m for m in config.channel_multipliers]
        self.conv_in = nn.Conv2d(3, config.base_channels, 3, padding=1, bias=False)
        self.levels, channels = nn.ModuleList(), config.base_channels
        for width in widths:
            blocks = [ResBlock(channels if i == 0 else width, width, config) for i in range(config.num_res_blocks)]
            self.levels.append(nn.Sequential(*blocks))
            channels = width
        self.mid = nn.Sequential(*(ResBlock(channels, channels, config) for _ in range(config.num_res_blocks)))
        self.norm_out = norm(channels, config)
        self.conv_out = nn.Conv2d(channels, config.latent_channels, 1)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Float RGB in [0, 1] to latents (B, C, h, w)."""
        x = self.conv_in(images_B3HW)
        for i, level in enumerate(self.levels):
            x = level(x)
            if i < len(self.levels) - 1:
                x = F.avg_pool2d(x, 2)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class TeacherDecoder(nn.Module):
    """Latent grid to image, doubling the side between levels; also the pixel decoder of a fine-tuned tokenizer."""

    def __init__(self, config: TeacherConfig) -> None:
        super().__init__()
        widths = [config.base_channels * m for m in config.channel_multipliers]
        channels = widths[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, channels, 3, padding=1)
        self.mid = nn.Sequential(*(ResBlock(channels, channels, config) for _ in range(config.num_res_blocks)))
        self.levels, self.upsample = nn.ModuleList(), nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            blocks = [ResBlock(channels if i == 0 else width, width, config) for i in range(config.num_res_blocks)]
            self.levels.append(nn.Sequential(*blocks))
            if level:
                self.upsample.append(nn.Conv2d(width, width, 3, padding=1))
            channels = width
        self.norm_out = norm(channels, config)
        self.conv_out = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, latents_BChw: Tensor) -> Tensor:
        """Latents (B, C, h, w) to float RGB (B, 3, H, W), not clamped."""
        x = self.mid(self.conv_in(latents_BChw))
        for i, level in enumerate(self.levels):
            x = level(x)
            if i < len(self.upsample):
                x = self.upsample[i](F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(x)))


def to_grid(vectors_BPC: Tensor) -> Tensor:
    """Arrange row-major vectors (B, P, C) of a square grid as (B, C, h, w)."""
    side = int(vectors_BPC.shape[1] ** 0.5)
    return vectors_BPC.transpose(1, 2).unflatten(2, (side, side))


class TeacherOutput(NamedTuple):
    """Output of a training pass."""

    images: Tensor
    """(B, 3, H, W), not clamped."""
    codes: Tensor
    """(B, P) int64."""
    latents: Tensor
    """(B, C, h, w), before quantization."""
    quantized: Tensor
    """(B, C, h, w), vectors of the codes."""


class Teacher(nn.Module):
    """Encoder, codebook and decoder of a MaskGIT-VQGAN."""

    def __init__(self, config: TeacherConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = TeacherEncoder(config)
        self.codebook = nn.Embedding(config.codebook_size, config.latent_channels)
        self.decoder = TeacherDecoder(config)

    @torch.autocast("cpu", enabled=False)
    @torch.autocast("cuda", enabled=False)
    def nearest(self, latents_BChw: Tensor) -> Tensor:
        """Find the nearest code of every position by squared distance, (B, P) int64, row-major.

        In float32 whatever the autocast, because near-ties decide codes.
        """
        x_BPC, codebook_VC = latents_BChw.flatten(2).transpose(1, 2).float(), self.codebook.weight.float()
        return (codebook_VC.square().sum(1) - 2 * x_BPC @ codebook_VC.T).argmin(-1)

    @torch.no_grad()
    def encode(self, images_B3HW: Tensor) -> Tensor:
        """Encode float RGB in [0, 1] to proxy codes (B, P) int64."""
        # Convolutions compute in channels last, and need not convert inputs that have this layout. On eager CUDA group
        # norms would convert them back each time, so there it pays only if the weights are channels last (compiled).
        if not images_B3HW.is_cuda or self.encoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last):
            images_B3HW = images_B3HW.contiguous(memory_format=torch.channels_last)
        return self.nearest(self.encoder(images_B3HW))

    def grid(self, codes_BP: Tensor) -> Tensor:
        """Look up proxy codes: their vectors on the square grid, (B, C, h, w)."""
        return to_grid(self.codebook(codes_BP))

    @torch.no_grad()
    def decode(self, codes_BP: Tensor) -> Tensor:
        """Decode proxy codes (B, P) to float RGB in [0, 1]."""
        return self.decoder(self.grid(codes_BP)).clamp(0, 1)

    def forward(self, images_B3HW: Tensor) -> TeacherOutput:
        """Reconstruct images in training; gradients pass straight through the quantization."""
        latents = self.encoder(images_B3HW)
        codes_BP = self.nearest(latents)
        quantized = self.grid(codes_BP)
        return TeacherOutput(self.decoder(latents + (quantized - latents).detach()), codes_BP, latents, quantized)
