"""LPIPS, the perceptual loss: distances between VGG16 features, weighted to match human judgement (Zhang et al. 2018).

Shapes: B images, C channels of a level, h x w its grid.
"""

import re
from collections.abc import Mapping
from importlib.metadata import distribution
from pathlib import Path

import torch
from torch import Tensor, nn

from sftok.weights.pickled import fill, read_state

# Channels of the 3x3 convolutions by level; each level but the first begins with a 2x2 max pool.
LEVELS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
SMALLEST = 1 << (len(LEVELS) - 1)  # side in pixels that leaves one position at the last level
# Published for inputs in [-1, 1]: ImageNet's mean and deviation, moved there.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
EPSILON = 1e-8
LINS_FILE = "torchmetrics/functional/image/lpips_models/vgg.pth"


class Lpips(nn.Module):
    """VGG16 up to its last ReLU, and channel weights at each level; frozen, in float32 whatever the autocast."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        self.readouts: list[int] = []
        for level in LEVELS:
            layers += [nn.MaxPool2d(2)] if layers else []
            for outputs in level:
                layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(inplace=True)]
                inputs = outputs
            self.readouts.append(len(layers))
        self.features = nn.Sequential(*layers)
        self.lins = nn.ModuleList(nn.Conv2d(level[-1], 1, 1, bias=False) for level in LEVELS)
        self.register_buffer("shift", torch.tensor(SHIFT).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(3, 1, 1), persistent=False)
        self.requires_grad_(False)

    @torch.autocast("cpu", enabled=False)
    @torch.autocast("cuda", enabled=False)
    def forward(self, images_B3HW: Tensor, targets_B3HW: Tensor) -> Tensor:
        """Compute distances (B,) between float RGB in [0, 1] and its targets; differentiable in both.

        Raises:
            ValueError: a side is below 16 pixels.
        """
        if min(images_B3HW.shape[2:]) < SMALLEST:
            raise ValueError(
                f"LPIPS of {tuple(images_B3HW.shape[2:])} pixels: needs at least {SMALLEST} per side; "
                "set perceptual_weight = 0"
            )
        distance_B = images_B3HW.new_zeros(len(images_B3HW), dtype=torch.float32)
        pairs = zip(self._levels(images_B3HW), self._levels(targets_B3HW), self.lins, strict=True)
        for image_BChw, target_BChw, lin in pairs:
            distance_B = distance_B + lin((image_BChw - target_BChw).square()).mean((1, 2, 3))
        return distance_B

    def _levels(self, images_B3HW: Tensor) -> list[Tensor]:
        """Compute features (B, C, h, w) of each level, of unit length at each position."""
        x = (images_B3HW.float() * 2 - 1 - self.shift) / self.scale
        levels, start = [], 0
        for end in self.readouts:
            x = self.features[start:end](x)
            # Deviates: epsilon is under the root, as in torchmetrics. The gradient of the published
            # x / (sqrt(sum x^2) + 1e-10) is unbounded where all channels are close to 0.
            levels.append(x / (x.square().sum(1, keepdim=True) + EPSILON).sqrt())
            start = end
        return levels


def load_lpips(data: bytes, what: str = "LPIPS") -> Lpips:
    """Load LPIPS from a file of weights.

    Args:
        data: torchvision's VGG16 (`features.N.weight`; its classifier is ignored), to be combined with the linear
            layers that torchmetrics ships; or a whole state dict of LPIPS(net="vgg") of the `lpips` package.
        what: name of the weights in errors.

    Raises:
        ValueError: the file is damaged, holds more than weights, or holds other weights.
    """
    state = read_state(data, what)
    is_whole = any(name.startswith("net.slice") for name in state)
    weights = _from_lpips(state) if is_whole else _from_torchvision(state) | _shipped_lins()
    model = Lpips()
    fill(model, weights, what)
    # A fifth faster on CPUs; images may come in either layout.
    return model.to(memory_format=torch.channels_last)


def _from_torchvision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if not name.startswith("classifier.")}


def _from_lpips(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of the `lpips` package, which lists the linear layers twice, and two constants."""
    constant = ("lins.", "scaling_layer.")
    kept = {name: value for name, value in state.items() if not name.startswith(constant)}
    return {re.sub(r"^net\.slice\d\.", "features.", _lin_name(name)): value for name, value in kept.items()}


def _lin_name(name: str) -> str:
    """Rename `lin2.model.1.weight` to `lins.2.weight`; leave other names as they are."""
    return re.sub(r"^lin(\d)\.model\.1\.", r"lins.\1.", name)


def _shipped_lins() -> dict[str, Tensor]:
    """Read the weights of the linear layers from torchmetrics' files, without importing it."""
    path = Path(str(distribution("torchmetrics").locate_file(LINS_FILE)))
    return {_lin_name(name): value for name, value in read_state(path.read_bytes(), str(path)).items()}
