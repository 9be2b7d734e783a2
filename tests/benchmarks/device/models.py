"""Models and images: SFTok-B at 256 pixels and its teacher, or toys at 32; random weights, on the device."""

import torch
from torch import Tensor

from sftok.config import TOKENIZERS, TeacherConfig
from sftok.model.teacher import Teacher
from sftok.model.tokenizer import SFTok
from tests.benchmarks import models
from tests.benchmarks.device.bench import Bench

TOY_SIZE = 32
TOY_TEACHER = TeacherConfig(
    base_channels=16,
    channel_multipliers=(1, 2, 2),
    num_res_blocks=1,
    latent_channels=16,
    codebook_size=32,
    norm_groups=8,
)


def tokenizer(bench: Bench, *, pixels: bool = True) -> SFTok:
    """The tokenizer, in evaluation mode and frozen."""
    name, teacher, size = ("toy", TOY_TEACHER, TOY_SIZE) if bench.is_quick else ("B", TeacherConfig(), models.B_SIZE)
    torch.manual_seed(0)
    with bench.device:
        model = SFTok(TOKENIZERS[name], teacher, size, pixels=pixels)
        model.initialise()
    return model.eval().requires_grad_(False)


def teacher(bench: Bench) -> Teacher:
    """Its teacher, in evaluation mode and frozen."""
    torch.manual_seed(0)
    with bench.device:
        made = Teacher(TOY_TEACHER if bench.is_quick else TeacherConfig())
    return made.eval().requires_grad_(False)


def images(bench: Bench, count: int) -> Tensor:
    """Float RGB in [0, 1] on the device, (count, 3, S, S)."""
    return models.pictures(count, TOY_SIZE if bench.is_quick else models.B_SIZE).to(bench.device)
