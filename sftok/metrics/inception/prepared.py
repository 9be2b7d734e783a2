"""The Inception network prepared for a machine: batch norms folded away, channels last, pools after convolutions.

Two changes of the published network leave its numbers as they are but for rounding:
- a batch norm in evaluation mode is a factor and a shift: it goes into its convolution, in float64;
- an average of 1x1 convolutions is the 1x1 convolution of the average, so the pooled branch averages its few outputs,
  not its many inputs. (Its ReLU follows. Maxima do not commute.)

On CPUs weights are laid out for oneDNN once, and the ReLU is computed on the way out. Nothing is compiled: what this
leaves to a compiler is 8 % of the time. On CUDA float32 is IEEE or TF32 as the process's numerics say.

Shapes: B images, C channels, h x w the grid of a level.
"""

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from infra.compute.packed import can_pack
from sftok.images.resize import Resize, resize
from sftok.metrics.inception.network import (
    POOLS,
    SPATIAL_BLOCK,
    ConvNorm,
    Inception,
    InceptionOutputs,
    Mixed,
    normalised,
    shrink,
    spatial_features,
)

Precision = Literal["fp32", "bf16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Batches(NamedTuple):
    """How many images are computed at once; rounding follows the shape of a product, so the last batch is filled up."""

    whole: int
    stem: int
    """of them in the first layers."""


CPU = Batches(8, 2)  # a map of 147 x 147 x 64 is 5.5 MB, and more of them leave the cache
CUDA = Batches(256, 256)  # whose largest map takes 1.4 GB in float32, of which three are in memory


class FoldedConv:
    """A layer with its norm inside; a ReLU follows unless told otherwise."""

    def __init__(self, layer: ConvNorm, dtype: torch.dtype, device: torch.device) -> None:
        weight, bias = folded(layer)
        self.stride, self.padding, self.dtype = list(layer.conv.stride), list(layer.layer.padding), dtype
        self.weight = weight.to(device, dtype).contiguous(memory_format=torch.channels_last)
        self.bias = bias.to(device, dtype)
        self.is_packed = device.type == "cpu" and can_pack(dtype)
        self.packed_for: torch.Size | None = None

    def __call__(self, x_BChw: Tensor, *, relu: bool = True) -> Tensor:
        """(B, C, h, w), channels last."""
        x_BChw = x_BChw.to(self.dtype)
        if not self.is_packed:
            y = F.conv2d(x_BChw, self.weight, self.bias, self.stride, self.padding)
            return y.relu_() if relu else y
        geometry = (self.padding, self.stride, [1, 1], 1)
        if self.packed_for != x_BChw.shape:
            # Which layout is best depends on the input's shape: with another one, oneDNN moves all weights every time.
            self.weight = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *geometry, x_BChw.shape)
            self.packed_for = x_BChw.shape
        act = "relu" if relu else "none"
        out: Tensor = torch.ops.mkldnn._convolution_pointwise(x_BChw, self.weight, self.bias, *geometry, act, [], "")
        return out


def folded(layer: ConvNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that does what a layer and its norm do, float64."""
    norm = layer.bn
    assert norm.running_mean is not None
    assert norm.running_var is not None
    factor = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    bias = norm.bias.double() - norm.running_mean.double() * factor
    return layer.conv.weight.double() * factor.view(-1, 1, 1, 1), bias


class FastMixed:
    """A block of branches."""

    def __init__(self, mixed: Mixed, dtype: torch.dtype, device: torch.device) -> None:
        block = mixed.block
        self.name, self.pool, self.pools_late = block.name, POOLS[block.pool], block.pool == "average"
        self.branches = [
            tuple([FoldedConv(mixed.layer(layer.name), dtype, device) for layer in part] for part in branch)
            for branch in block.branches
        ]
        self.pool_layer = None
        if block.pool_layer is not None:
            self.pool_layer = FoldedConv(mixed.layer(block.pool_layer.name), dtype, device)

    def __call__(self, x_BChw: Tensor) -> Tensor:
        """(B, C, h, w) to what all branches make of it, side by side."""
        maps = []
        for chain, fork in self.branches:
            y = x_BChw
            for layer in chain:
                y = layer(y)
            maps += [layer(y) for layer in fork] or [y]
        maps.append(self._pooled(x_BChw))
        return torch.cat(maps, dim=1)

    def _pooled(self, x_BChw: Tensor) -> Tensor:
        if self.pool_layer is None:
            return self.pool(x_BChw)
        if self.pools_late:
            return self.pool(self.pool_layer(x_BChw, relu=False)).relu_()
        return self.pool_layer(self.pool(x_BChw))


class PreparedInception:
    """uint8 images to what the metrics compare. Holds the weights as they were when it was made."""

    def __init__(self, network: Inception, precision: Precision, device: torch.device) -> None:
        self.precision, self.device = precision, device
        self.batches = CUDA if device.type == "cuda" else CPU
        dtype = DTYPES[precision]
        # The first layer in float32 whatever the precision: a percent of the work, and bf16 would round the pixels.
        self.stem = [
            [FoldedConv(layer, dtype if layer.conv.in_channels > 3 else torch.float32, device) for layer in level]
            for level in network.stem()
        ]
        self.blocks = [FastMixed(mixed, dtype, device) for mixed in network.mixed()]
        self.classifier_KD = network.fc.weight.to(device, torch.float32)

    @torch.inference_mode()
    def __call__(self, images_B3HW: Tensor, how: Resize) -> InceptionOutputs:
        """Outputs of uint8 RGB images (B, 3, H, W), float32, on the network's device; independent of batch mates.

        Raises:
            ValueError: the images are no uint8 RGB.
        """
        batches = [self._batch(batch, how) for batch in images_B3HW.split(self.batches.whole)]
        return InceptionOutputs(*(torch.cat(parts) for parts in zip(*batches, strict=True)))

    def _batch(self, images_B3HW: Tensor, how: Resize) -> InceptionOutputs:
        pixels_B3SS = resize(images_B3HW.to(self.device), how)
        missing = self.batches.whole - len(pixels_B3SS)
        x = F.pad(normalised(pixels_B3SS), (0, 0, 0, 0, 0, 0, 0, missing)).contiguous(memory_format=torch.channels_last)
        x = torch.cat([self._stem(part) for part in x.split(self.batches.stem)])
        spatial_BD = x
        for block in self.blocks:
            x = block(x)
            if block.name == SPATIAL_BLOCK:
                spatial_BD = spatial_features(x).float()
        pool_BD = x.float().mean((2, 3))
        outputs = (pool_BD, spatial_BD, F.linear(pool_BD, self.classifier_KD))
        return InceptionOutputs(*(output[: len(images_B3HW)] for output in outputs))

    def _stem(self, x_BChw: Tensor) -> Tensor:
        for level in self.stem:
            for layer in level:
                x_BChw = layer(x_BChw)
            x_BChw = shrink(x_BChw)
        return x_BChw


def prepare_inception(
    network: Inception, *, precision: str = "fp32", device: torch.device | str = "cpu"
) -> PreparedInception:
    """Prepare the network for a device; once a worker.

    Args:
        network: with its weights.
        precision: `fp32`, or `bf16` for speed, whose features differ from those of fp32 by a percent: its
            figures compare with their like only.
        device: where it shall run.

    Raises:
        ValueError: there is no such precision.
    """
    for known in PRECISIONS:
        if precision == known:
            return PreparedInception(network, known, torch.device(device))
    raise ValueError(f"precision = {precision!r} is not known: name one of {', '.join(PRECISIONS)}")
