"""The Inception network prepared for inference: batch norms folded away, channels last, pools after convolutions.

Two changes of the published network leave its numbers as they are but for rounding:
- a batch norm in evaluation mode is a factor and a shift, which are folded into its convolution, in float64;
- the average of a 1x1 convolution's outputs is its output for the average of the inputs, so the pooled branch averages
  its few outputs, not its many inputs. (Its ReLU follows. Maxima do not commute.)

CPUs have convolutions of their own with the same numbers (`cpu`). Nothing is compiled: a compiler would save at most
8 % of the time. On CUDA float32 is IEEE or TF32, as the process's numerics say.

Shapes: B images, C channels, h x w the grid of a level.
"""

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from infra.compute.packed import can_pack
from sftok.metrics.inception.cpu import PackedConv
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
from sftok.metrics.inception.resize import Resize, resize

Precision = Literal["fp32", "bf16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Batches(NamedTuple):
    """Images per batch; rounding depends on the shape of a product, so the last batch is padded."""

    whole: int
    stem: int
    """images at once in the first layers."""


CPU = Batches(8, 2)  # a map of 147 x 147 x 64 is 5.5 MB; more of them do not fit in the cache
CUDA = Batches(256, 256)  # the largest map takes 1.4 GB in float32, and three are in memory


class FoldedConv:
    """A convolution with its batch norm folded in, followed by a ReLU unless `relu` is false."""

    def __init__(self, layer: ConvNorm, dtype: torch.dtype, device: torch.device) -> None:
        weight, bias = folded(layer)
        self.stride, self.padding, self.dtype = layer.conv.stride, layer.layer.padding, dtype
        weight = weight.to(device, dtype).contiguous(memory_format=torch.channels_last)
        bias = bias.to(device, dtype)
        self.packed: PackedConv | None = None
        if device.type != "cpu" or not can_pack(dtype):
            self.weight, self.bias = weight, bias
        else:
            self.packed = PackedConv(weight, bias, self.stride, self.padding)

    def __call__(self, x_BChw: Tensor, *, relu: bool = True) -> Tensor:
        """(B, C, h, w), channels last."""
        x_BChw = x_BChw.to(self.dtype)
        if self.packed is None:
            y = F.conv2d(x_BChw, self.weight, self.bias, self.stride, self.padding)
            return y.relu_() if relu else y
        return self.packed(x_BChw, relu=relu)


def folded(layer: ConvNorm) -> tuple[Tensor, Tensor]:
    """Fold a layer's batch norm into its convolution: weight and bias, float64."""
    norm = layer.bn
    assert norm.running_mean is not None
    assert norm.running_var is not None
    factor = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    bias = norm.bias.double() - norm.running_mean.double() * factor
    return layer.conv.weight.double() * factor.view(-1, 1, 1, 1), bias


class PreparedMixed:
    """A block of branches, prepared."""

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
        """(B, C, h, w) to the outputs of all branches, concatenated."""
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
    """uint8 images to the features that metrics compare. Holds the weights as they were when it was made."""

    def __init__(self, network: Inception, precision: Precision, device: torch.device) -> None:
        self.precision, self.device = precision, device
        self.batches = CUDA if device.type == "cuda" else CPU
        dtype = DTYPES[precision]
        # The first layer in float32 whatever the precision: 1 % of the work, and bf16 would round the pixels.
        self.stem = [
            [FoldedConv(layer, dtype if layer.conv.in_channels > 3 else torch.float32, device) for layer in level]
            for level in network.stem()
        ]
        self.blocks = [PreparedMixed(mixed, dtype, device) for mixed in network.mixed()]
        self.classifier_KD = network.fc.weight.to(device, torch.float32)

    @torch.inference_mode()
    def __call__(self, images_B3HW: Tensor, how: Resize) -> InceptionOutputs:
        """Process uint8 RGB images (B, 3, H, W) to float32 outputs on the network's device, independent of batch mates.

        Raises:
            ValueError: the images are not uint8 RGB.
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
    """Prepare the network for a device; once per worker.

    Args:
        network: with its weights.
        precision: `fp32`, or `bf16` for speed, whose features differ from those of fp32 by 1 %: scores of one
            precision compare with their like only.
        device: where it will run.

    Raises:
        ValueError: the precision is unknown.
    """
    for known in PRECISIONS:
        if precision == known:
            return PreparedInception(network, known, torch.device(device))
    raise ValueError(f"precision = {precision!r} is not known: name one of {', '.join(PRECISIONS)}")
