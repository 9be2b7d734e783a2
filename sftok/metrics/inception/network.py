"""The Inception network of FID: the 2015 classifier whose features FID, IS and KID compare.

The architecture of Szegedy et al. 2016 (Inception-v3) with the peculiarities of TensorFlow's file of 2015-12-05:
average pools do not count the padding, the last block pools by maximum, 1,008 outputs. Modules are named as in the
published file (`pt_inception-2015-12-05-6726825d.pth`), which torch-fidelity, pytorch-fid and torchmetrics read too.

Shapes: B images, C channels, h x w the grid of a level, K = 1008 classes.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sftok.metrics.inception.resize import SIDE

POOL, CLASSES = 2048, 1008
SPATIAL_CHANNELS, SPATIAL_SIDE = 7, 17
SPATIAL = SPATIAL_CHANNELS * SPATIAL_SIDE**2  # 2,023 values, about as many as POOL (Nash et al. 2021)
NORM_EPSILON = 1e-3


class Layer(NamedTuple):
    """A convolution without bias, batch norm and ReLU; padded to keep the grid, unless it is strided."""

    name: str
    channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    is_padded: bool = True

    @property
    def padding(self) -> tuple[int, int]:
        """Pixels added on each side."""
        return (self.kernel[0] // 2, self.kernel[1] // 2) if self.is_padded else (0, 0)


class Branch(NamedTuple):
    """A chain of layers, and a fork of layers that each read its output and are concatenated."""

    chain: tuple[Layer, ...]
    fork: tuple[Layer, ...] = ()


class Block(NamedTuple):
    """Concatenated branches and a pool: 3x3 averages, maxima, or maxima with stride 2 (without a layer)."""

    name: str
    branches: tuple[Branch, ...]
    pool: str
    pool_layer: Layer | None = None


def _strided(name: str, channels: int) -> Layer:
    return Layer(name, channels, (3, 3), 2, is_padded=False)


def _double_3x3(first: int) -> tuple[Layer, ...]:
    return (Layer("branch3x3dbl_1", first), Layer("branch3x3dbl_2", 96, (3, 3)))


def _grid_35(name: str, pooled: int) -> Block:
    fives = (Layer("branch5x5_1", 48), Layer("branch5x5_2", 64, (5, 5)))
    threes = (*_double_3x3(64), Layer("branch3x3dbl_3", 96, (3, 3)))
    branches = (Branch((Layer("branch1x1", 64),)), Branch(fives), Branch(threes))
    return Block(name, branches, "average", Layer("branch_pool", pooled))


def _to_17(name: str) -> Block:
    threes = (*_double_3x3(64), _strided("branch3x3dbl_3", 96))
    return Block(name, (Branch((_strided("branch3x3", 384),)), Branch(threes)), "shrink")


def _grid_17(name: str, width: int) -> Block:
    row, column = (1, 7), (7, 1)
    once = (Layer("branch7x7_1", width), Layer("branch7x7_2", width, row), Layer("branch7x7_3", 192, column))
    shapes = ((width, (1, 1)), (width, column), (width, row), (width, column), (192, row))
    twice = tuple(Layer(f"branch7x7dbl_{i}", *shape) for i, shape in enumerate(shapes, start=1))
    branches = (Branch((Layer("branch1x1", 192),)), Branch(once), Branch(twice))
    return Block(name, branches, "average", Layer("branch_pool", 192))


def _to_8(name: str) -> Block:
    threes = (Layer("branch3x3_1", 192), _strided("branch3x3_2", 320))
    sevens = (Layer("branch7x7x3_1", 192), Layer("branch7x7x3_2", 192, (1, 7)), Layer("branch7x7x3_3", 192, (7, 1)))
    return Block(name, (Branch(threes), Branch((*sevens, _strided("branch7x7x3_4", 192)))), "shrink")


def _grid_8(name: str, pool: str) -> Block:
    def fork(stem: str) -> tuple[Layer, Layer]:
        return Layer(f"{stem}a", 384, (1, 3)), Layer(f"{stem}b", 384, (3, 1))

    double = (Layer("branch3x3dbl_1", 448), Layer("branch3x3dbl_2", 384, (3, 3)))
    threes = Branch((Layer("branch3x3_1", 384),), fork("branch3x3_2"))
    branches = (Branch((Layer("branch1x1", 320),)), threes, Branch(double, fork("branch3x3dbl_3")))
    return Block(name, branches, pool, Layer("branch_pool", 192))


# 299 -> 149 -> 147 -> 147, pooled to 73; 73 -> 71, pooled to 35.
STEM = (
    (
        _strided("Conv2d_1a_3x3", 32),
        Layer("Conv2d_2a_3x3", 32, (3, 3), is_padded=False),
        Layer("Conv2d_2b_3x3", 64, (3, 3)),
    ),
    (Layer("Conv2d_3b_1x1", 80), Layer("Conv2d_4a_3x3", 192, (3, 3), is_padded=False)),
)
BLOCKS = (
    *(_grid_35("Mixed_5b", 32), _grid_35("Mixed_5c", 64), _grid_35("Mixed_5d", 64), _to_17("Mixed_6a")),
    *(_grid_17("Mixed_6b", 128), _grid_17("Mixed_6c", 160), _grid_17("Mixed_6d", 160), _grid_17("Mixed_6e", 192)),
    *(_to_8("Mixed_7a"), _grid_8("Mixed_7b", "average"), _grid_8("Mixed_7c", "maximum")),
)
# TensorFlow counts mixed blocks from 0: its mixed_6 is this one, and its first branch comes first in the map.
SPATIAL_BLOCK = "Mixed_6d"


class InceptionOutputs(NamedTuple):
    """The outputs that metrics use, float32 (or the network's float64).

    pool: (B, 2048), means over the last grid: FID, KID, precision, recall, density, coverage.
    spatial: (B, 2023), the first 7 channels of the 17x17 map mixed_6, in TensorFlow's order (h, w, C): sFID.
    logits: (B, 1008) without the bias, as the Inception Score of torch-fidelity and ADM takes them.
    """

    pool: Tensor
    spatial: Tensor
    logits: Tensor


class ConvNorm(nn.Module):
    """A convolution with its batch norm and ReLU, in evaluation mode."""

    def __init__(self, inputs: int, layer: Layer) -> None:
        super().__init__()
        self.layer = layer
        self.conv = nn.Conv2d(inputs, layer.channels, layer.kernel, layer.stride, layer.padding, bias=False)
        self.bn = nn.BatchNorm2d(layer.channels, eps=NORM_EPSILON)

    def forward(self, x_BChw: Tensor) -> Tensor:
        """(B, C, h, w)."""
        return self.bn(self.conv(x_BChw)).relu()


class Mixed(nn.Module):
    """One block of branches."""

    def __init__(self, inputs: int, block: Block) -> None:
        super().__init__()
        self.block = block
        outputs = inputs if block.pool_layer is None else block.pool_layer.channels
        for branch in block.branches:
            width = inputs
            for layer in branch.chain:
                self.add_module(layer.name, ConvNorm(width, layer))
                width = layer.channels
            for layer in branch.fork:
                self.add_module(layer.name, ConvNorm(width, layer))
            outputs += sum(layer.channels for layer in branch.fork) or width
        if block.pool_layer is not None:
            self.add_module(block.pool_layer.name, ConvNorm(inputs, block.pool_layer))
        self.outputs = outputs

    def layer(self, name: str) -> ConvNorm:
        """Return a layer by name."""
        found = self.get_submodule(name)
        assert isinstance(found, ConvNorm)
        return found

    def forward(self, x_BChw: Tensor) -> Tensor:
        """(B, C, h, w) to the outputs of all branches, concatenated."""
        maps = []
        for branch in self.block.branches:
            y = x_BChw
            for layer in branch.chain:
                y = self.layer(layer.name)(y)
            maps += [self.layer(layer.name)(y) for layer in branch.fork] or [y]
        pooled = POOLS[self.block.pool](x_BChw)
        maps.append(pooled if self.block.pool_layer is None else self.layer(self.block.pool_layer.name)(pooled))
        return torch.cat(maps, dim=1)


def _average(x_BChw: Tensor) -> Tensor:
    return F.avg_pool2d(x_BChw, 3, stride=1, padding=1, count_include_pad=False)


def _maximum(x_BChw: Tensor) -> Tensor:
    return F.max_pool2d(x_BChw, 3, stride=1, padding=1)


def shrink(x_BChw: Tensor) -> Tensor:
    """Pool by maxima of 3x3 with stride 2."""
    return F.max_pool2d(x_BChw, 3, stride=2)


POOLS: dict[str, Callable[[Tensor], Tensor]] = {"average": _average, "maximum": _maximum, "shrink": shrink}


class Inception(nn.Module):
    """The network as published, frozen: the reference for faster forms."""

    def __init__(self) -> None:
        super().__init__()
        width = 3
        for layer in (layer for level in STEM for layer in level):
            self.add_module(layer.name, ConvNorm(width, layer))
            width = layer.channels
        for block in BLOCKS:
            mixed = Mixed(width, block)
            self.add_module(block.name, mixed)
            width = mixed.outputs
        self.fc = nn.Linear(width, CLASSES)
        assert width == POOL
        self.requires_grad_(False).eval()

    def stem(self) -> Iterator[list[ConvNorm]]:
        """Yield the layers before the blocks, up to each pool."""
        for level in STEM:
            layers = [self.get_submodule(layer.name) for layer in level]
            yield [layer for layer in layers if isinstance(layer, ConvNorm)]

    def mixed(self) -> Iterator[Mixed]:
        """Yield the blocks, in order."""
        for block in BLOCKS:
            mixed = self.get_submodule(block.name)
            assert isinstance(mixed, Mixed)
            yield mixed

    def forward(self, pixels_B3SS: Tensor) -> InceptionOutputs:
        """Float pixels in [0, 255], resized to 299 x 299, (B, 3, 299, 299), to the outputs."""
        assert pixels_B3SS.shape[1:] == (3, SIDE, SIDE)
        x = normalised(pixels_B3SS)
        for level in self.stem():
            for layer in level:
                x = layer(x)
            x = shrink(x)
        spatial_BD = x
        for mixed in self.mixed():
            x = mixed(x)
            if mixed.block.name == SPATIAL_BLOCK:
                spatial_BD = spatial_features(x)
        pool_BD = x.mean((2, 3))
        return InceptionOutputs(pool_BD, spatial_BD, F.linear(pool_BD, self.fc.weight))


def normalised(pixels: Tensor) -> Tensor:
    """Map [0, 255] to [-1, 1) as TensorFlow's graph does, to the bit."""
    return (pixels - 128) / 128


def spatial_features(map_BChw: Tensor) -> Tensor:
    """Select the spatial features (B, 2023) of a map (B, C, 17, 17)."""
    return map_BChw[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
