"""Image features without downloaded weights: a seeded random convolutional network.

Random embeddings rank generators sensibly (Naeem et al. 2020, section 4.2), but distances between them have another
scale than between Inception features and are no substitute for FID: their label is "FD (random features)".
"""

import hashlib
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_WIDTHS = (16, 32, 64, 128)  # channels of the first levels; further levels keep the last
_BATCH = 64


class RandomFeatures:
    """uint8 images (B, 3, S, S) to float32 features (B, D): strided convolutions with ReLU, mean pools of all levels.

    Convolutions are 3x3; levels halve the image down to 2x2: 32 px give 240 dimensions. Weights are He-uniform from the
    raw bits of PCG64(seed), the part of NumPy's generators with a guaranteed stream: the same bits everywhere.
    """

    name: ClassVar[str] = "random-conv/1"
    label: ClassVar[str] = "FD (random features)"

    def __init__(self, seed: int, image_size: int) -> None:
        if image_size < 8:
            raise ValueError(f"image_size = {image_size} is too small for random features: at least 8")
        bits = np.random.PCG64(seed)
        self.seed, self.image_size = seed, image_size
        self.weights: list[Tensor] = []
        self._placed: dict[torch.device, list[Tensor]] = {}
        channels = 3
        for level in range(image_size.bit_length() - 2):
            width = _WIDTHS[min(level, len(_WIDTHS) - 1)]
            self.weights.append(_he_uniform(bits, (width, channels, 3, 3)))
            channels = width

    @property
    def dimensions(self) -> int:
        """Length of a feature vector."""
        return sum(len(weight) for weight in self.weights)

    @property
    def description(self) -> str:
        """Name and length, for the protocol of a score."""
        return f"{self.name}, {self.dimensions} dimensions"

    @property
    def sha256(self) -> str:
        """Hash of the weights, for the protocol of a score."""
        data = b"".join(weight.numpy().astype("<f4").tobytes() for weight in self.weights)
        return hashlib.sha256(data).hexdigest()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Compute features on the images' device, independent of the number of images.

        Batches have one size; the last one is padded.
        """
        expected = (3, self.image_size, self.image_size)
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != expected or not len(images):
            raise ValueError(f"images are {images.dtype} {tuple(images.shape)}: give uint8 (n, {str(expected)[1:-1]})")
        return torch.cat([self._batch(batch) for batch in torch.split(images, _BATCH)])

    def _batch(self, images: Tensor) -> Tensor:
        maps = F.pad(images, (0, 0, 0, 0, 0, 0, 0, _BATCH - len(images))).float() / 127.5 - 1
        pools = []
        if maps.device not in self._placed:
            self._placed[maps.device] = [weight.to(maps.device) for weight in self.weights]
        for weight in self._placed[maps.device]:
            maps = F.conv2d(maps, weight, stride=2, padding=1).relu()
            pools.append(maps.mean((2, 3)))
        return torch.cat(pools, dim=1)[: len(images)]


def _he_uniform(bits: np.random.PCG64, shape: tuple[int, ...]) -> Tensor:
    """Draw from U(-b, b), b = sqrt(6 / fan_in), with 24 random bits per weight, which float32 holds exactly."""
    raw = bits.random_raw(int(np.prod(shape))) >> np.uint64(40)
    bound = float(np.sqrt(6 / np.prod(shape[1:])))
    values = (raw.astype(np.float64) / 2**23 - 1) * bound
    return torch.from_numpy(values.astype(np.float32).reshape(shape))
