"""Discriminators between real images and reconstructions: by patches (PatchGAN) or by features of a frozen DINO.

Neither keeps batch statistics nor changes when it is called: a pass depends on its images and weights alone, so the
generator's steps do not change it, and ranks need to agree on gradients only.

Shapes: B images, H x W pixels, n logits per image; D channels and N patches of DINO's features.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sftok.config import VIRTUAL_BATCH
from sftok.losses.dino import READOUTS, WIDTH, Dino, check_dino_size

SLOPE = 0.2  # of the leaky ReLUs
GROUP = 16  # channels that a group norm normalises together
INIT_STD = 0.02
EPSILON = 1e-6
FIRST_ITERATIONS = 15  # of the power method, at random weights


class PatchDiscriminator(nn.Module):
    """PatchGAN: 4x4 convolutions that judge overlapping patches (70 pixels with 3 layers; Isola et al. 2017).

    Deviates: pix2pix normalises over the batch. Here groups of channels are normalised within each image, so a logit
    depends on its image alone: not on the micro-batch or the rank, nor on whether real images and reconstructions come
    in one batch or in two.
    """

    def __init__(self, channels: int, layers: int) -> None:
        """Build `layers` layers that halve the side, from `channels` channels to at most eight times as many."""
        super().__init__()
        self.layers = layers
        widths = [channels * min(1 << i, 8) for i in range(layers + 1)]
        modules: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(SLOPE)]
        for index, (inputs, outputs) in enumerate(pairwise(widths)):
            is_last = index == layers - 1
            modules += [
                nn.Conv2d(inputs, outputs, 4, stride=1 if is_last else 2, padding=1, bias=False),
                nn.GroupNorm(outputs // math.gcd(outputs, GROUP), outputs),
                nn.LeakyReLU(SLOPE),
            ]
        modules.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.net = nn.Sequential(*modules)
        self.initialise()

    def initialise(self) -> None:
        """Initialise as pix2pix does.

        | what | how |
        |---|---|
        | convolution | normal, std 0.02; bias 0 |
        | norm | weight 1, bias 0 |
        """
        for module in self.net:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=INIT_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Float RGB in [0, 1] to logits (B, n), n = (H / 2^layers - 2) (W / 2^layers - 2): high for real images.

        Raises:
            ValueError: the images are too small.
        """
        check_patch_size(min(images_B3HW.shape[2:]), self.layers)
        return self.net(images_B3HW).flatten(1)


def check_patch_size(image_size: int, layers: int) -> None:
    """Check that images are large enough for a patch discriminator.

    Raises:
        ValueError: `image_size` is below 3 * 2^layers.
    """
    smallest = 3 << layers
    if image_size < smallest:
        raise ValueError(
            f"image_size = {image_size} is too small for adversarial.layers = {layers}: choose at least {smallest}, "
            "or fewer layers"
        )


class SpectralConv1d(nn.Conv1d):
    """A circular convolution of equal length, whose kernel as an (outputs, inputs * size) matrix has spectral norm 1.

    Deviates: torch's spectral norm iterates whenever it is called in training mode, so its estimate depends on the
    number of micro-batches of a rank and on the generator's steps. Here `iterate` is called once per step.
    """

    u: Tensor
    v: Tensor

    def __init__(self, inputs: int, outputs: int, size: int) -> None:
        super().__init__(inputs, outputs, size)
        self.register_buffer("u", F.normalize(torch.randn(outputs), dim=0))
        self.register_buffer("v", F.normalize(torch.randn(inputs * size), dim=0))
        for _ in range(FIRST_ITERATIONS):
            self.iterate()

    @torch.no_grad()
    def iterate(self) -> None:
        """Run one iteration of the power method towards the first singular vectors u and v."""
        matrix = self.weight.flatten(1)
        self.u.copy_(F.normalize(matrix @ self.v, dim=0))
        self.v.copy_(F.normalize(matrix.T @ self.u, dim=0))

    def forward(self, x_BDN: Tensor) -> Tensor:
        """(B, inputs, N) to (B, outputs, N)."""
        norm = self.u @ (self.weight.flatten(1) @ self.v)
        around = self.kernel_size[0] // 2
        return F.conv1d(F.pad(x_BDN, (around, around), mode="circular"), self.weight / norm, self.bias)


class BatchNormLocal(nn.Module):
    """Batch norm over groups of at most 8 neighbours in the batch, in training and in evaluation (StyleGAN-T)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x_BDN: Tensor) -> Tensor:
        """(B, D, N) to (B, D, N).

        Raises:
            ValueError: the batch does not divide into equal groups.
        """
        groups = check_local_batch(len(x_BDN))
        x_GbDN = x_BDN.unflatten(0, (groups, -1))
        variance, mean = torch.var_mean(x_GbDN, dim=(1, 3), correction=0, keepdim=True)
        x_BDN = ((x_GbDN - mean) * (variance + EPSILON).rsqrt()).flatten(0, 1)
        return x_BDN * self.weight[:, None] + self.bias[:, None]


def check_local_batch(batch: int) -> int:
    """Return the number of equal groups of at most 8 images that `BatchNormLocal` splits a batch into.

    Raises:
        ValueError: `batch` does not divide by ceil(batch / 8).
    """
    groups = math.ceil(batch / VIRTUAL_BATCH)
    if batch % groups:
        raise ValueError(
            f"a micro-batch of {batch} images does not divide into {groups} equal groups of at most {VIRTUAL_BATCH}, "
            f"which the DINO discriminator normalises over; set training.micro_batch to a multiple of {VIRTUAL_BATCH}, "
            "or to at most it"
        )
    return groups


class _Head(nn.Module):
    """Logits of the features of one depth: pointwise, then a residual along patches in raster order, then one channel.

    Weights are initialised as torch initialises convolutions, norms with 1 and 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv_1, self.norm_1 = SpectralConv1d(WIDTH, WIDTH, 1), BatchNormLocal(WIDTH)
        self.conv_2, self.norm_2 = SpectralConv1d(WIDTH, WIDTH, 9), BatchNormLocal(WIDTH)
        self.conv_out = SpectralConv1d(WIDTH, 1, 1)

    def forward(self, x_BDN: Tensor) -> Tensor:
        x_BDN = F.leaky_relu(self.norm_1(self.conv_1(x_BDN)), SLOPE)
        y_BDN = F.leaky_relu(self.norm_2(self.conv_2(x_BDN)), SLOPE)
        return self.conv_out((x_BDN + y_BDN) / math.sqrt(2)).flatten(1)


class DinoDiscriminator(nn.Module):
    """Trained heads on the features of five depths of a frozen DINO (method.md 1.3)."""

    def __init__(self, dino: Dino) -> None:
        super().__init__()
        self.dino = dino
        self.heads = nn.ModuleList(_Head() for _ in range(READOUTS))

    def forward(self, images_B3SS: Tensor) -> Tensor:
        """Float RGB in [0, 1], as `dino_view` returns it, to logits (B, 5 N): high for real images.

        Raises:
            ValueError: the size does not divide into DINO's patches, or the batch into equal groups.
        """
        check_dino_size(images_B3SS.shape[2])
        features = self.dino(images_B3SS)
        return torch.cat([head(x_BDN) for head, x_BDN in zip(self.heads, features, strict=True)], dim=1)


def iterate_spectral_norms(module: nn.Module) -> None:
    """Update every spectral norm in `module`, once after each step of the optimizer of its weights."""
    for child in module.modules():
        if isinstance(child, SpectralConv1d):
            child.iterate()
