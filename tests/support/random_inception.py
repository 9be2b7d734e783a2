"""Inception with seeded random weights, in the files of the tools that read it, and images whose features differ."""

import fcntl
import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sftok.metrics.inception.network import Inception

PUBLISHED_NAME = "pt_inception-2015-12-05-6726825d.pth"  # pytorch-fid looks for it in hub/checkpoints


@dataclass(frozen=True)
class RandomInception:
    folder: Path
    path: Path
    sha256: str


def network() -> Inception:
    """He weights; norms with random factors, and statistics near those that images have, so that nothing dies out."""
    generator = torch.Generator().manual_seed(0)
    model = Inception()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                fan_in = module.weight[0].numel()
                module.weight.normal_(0, (2 / fan_in) ** 0.5, generator=generator)
            elif isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.weight.uniform_(0.8, 1.4, generator=generator)
                module.bias.normal_(0, 0.2, generator=generator)
                module.momentum = 1.0
                module.train()
        model.fc.weight.normal_(0, 0.005, generator=generator)
        model.fc.bias.normal_(0, 0.1, generator=generator)
        model(F.interpolate(pictures(4, 32, seed=9).float(), (299, 299)))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                deviation = module.running_var.sqrt()
                module.running_mean += 0.3 * deviation * torch.randn(deviation.shape, generator=generator)
                module.running_var *= torch.empty(deviation.shape).uniform_(0.7, 1.4, generator=generator)
    return model.eval()


def write(folder: Path) -> RandomInception:
    """As pytorch-fid and torch-fidelity read it, where pytorch-fid looks for it if TORCH_HOME is `folder`."""
    path = folder / "hub" / "checkpoints" / PUBLISHED_NAME
    path.parent.mkdir(parents=True)
    torch.save(network().state_dict(), path.with_suffix(".partial"))
    path.with_suffix(".partial").rename(path)
    return RandomInception(folder, path, hashlib.sha256(path.read_bytes()).hexdigest())


def shared_inception(folder: Path) -> RandomInception:
    """That of all processes of the tests, which the first caller writes: 95 MB, and seconds to draw them."""
    with (folder / "inception.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = folder / "inception" / "hub" / "checkpoints" / PUBLISHED_NAME
        if not path.exists():
            return write(folder / "inception")
    return RandomInception(folder / "inception", path, hashlib.sha256(path.read_bytes()).hexdigest())


def pictures(count: int, size: int, seed: int) -> Tensor:
    """uint8 (count, 3, size, size): a colour, a contrast, a coarseness and grain of their own each."""
    generator = torch.Generator().manual_seed(seed)
    images = []
    for _ in range(count):
        cells = int(torch.randint(2, size // 2, (), generator=generator))
        coarse = torch.randn(1, 3, cells, cells, generator=generator)
        smooth = F.interpolate(coarse, (size, size), mode="bilinear")[0]
        contrast, colour = torch.rand((), generator=generator) * 90, torch.rand(3, 1, 1, generator=generator) * 255
        grain = torch.randn(3, size, size, generator=generator) * torch.rand((), generator=generator) * 30
        images.append((colour + contrast * smooth + grain).clamp(0, 255).round().to(torch.uint8))
    return torch.stack(images)
