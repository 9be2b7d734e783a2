"""Toy models and images for the tests of the tokenizer."""

import torch

from infra.training.config import OptimizerConfig, TrainingConfig
from sftok.config import AugmentConfig, TeacherConfig, TokenizerConfig, TransformerConfig
from sftok.images.dataset import ImageRows
from sftok.model.tokenizer import SFTok
from sftok.training.common import TrainingImages

SIZE = 16
TEACHER = TeacherConfig(
    base_channels=8, channel_multipliers=(1, 2, 2), num_res_blocks=1, latent_channels=8, codebook_size=32, norm_groups=4
)
TOKENIZER = TokenizerConfig(
    patch_size=4,
    num_latent_tokens=8,
    codebook_size=64,
    code_dim=8,
    encoder=TransformerConfig(width=32, layers=1, heads=2, init_std=0.1),
    decoder=TransformerConfig(width=48, layers=2, heads=2, init_std=0.1),
)
STILL = AugmentConfig(crop="center", flip=False)


def tokenizer(*, pixels: bool = False) -> SFTok:
    torch.manual_seed(0)
    model = SFTok(TOKENIZER, TEACHER, SIZE, pixels=pixels)
    model.initialise()
    return model.eval()


def images(count: int = 12) -> TrainingImages:
    """Gratings of four directions."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    waves = [(x * (i % 2) + y * (i % 4 > 1)) * 0.8 + torch.rand((), generator=generator) * 6 for i in range(count)]
    pixels = torch.stack([(127 + 120 * wave.sin()).to(torch.uint8).expand(3, -1, -1) for wave in waves])
    rows = ImageRows([f"{i:03d}" for i in range(count)], pixels, torch.arange(count) % 4)
    return TrainingImages(rows, rows, STILL)


def training(steps: int, **changes: object) -> TrainingConfig:
    optimizer = OptimizerConfig(lr=3e-3, end_lr=1e-3, warmup_steps=5, ema_decay=0.9)
    values = {"steps": steps, "batch_size": 12, "optimizer": optimizer, "log_every": 1, **changes}
    return TrainingConfig.model_validate(values)
