"""Models with random weights, and images, for the benchmarks of CPUs."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sftok.config import TOKENIZERS, TeacherConfig, TokenizerConfig, TransformerConfig
from sftok.model.prepared import PreparedEncoder
from sftok.model.tokenizer import SFTok

B_SIZE = 256
B_ENCODE_GFLOP = 58.6  # of the full forward, every block on every position
SMALL_SIZE = 64


def sftok_b() -> SFTok:
    """SFTok-B with a pixel decoder, 205.85 M parameters, frozen."""
    return _random(TOKENIZERS["B"], B_SIZE, pixels=True).eval().requires_grad_(False)


def small_tokenizer() -> SFTok:
    """10.6 M parameters for images of 64 pixels: 64 patches, 64 latent tokens, a 4 x 4 grid of proxy codes."""
    part = TransformerConfig(width=256, layers=6, heads=4)
    config = TokenizerConfig(patch_size=8, encoder=part, decoder=part)
    return _random(config, SMALL_SIZE, pixels=False)


def pictures(count: int, size: int) -> Tensor:
    """Float RGB in [0, 1], (count, 3, size, size): smooth colours with some grain."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(count, 3, 8, 8, generator=generator)
    smooth = F.interpolate(coarse, size=(size, size), mode="bicubic", antialias=False)
    return (smooth + 0.1 * torch.randn(smooth.shape, generator=generator)).clamp(0, 1)


@torch.no_grad()
def draw_codebook(model: SFTok, encoder: PreparedEncoder, batch: int) -> None:
    """Put what the encoder makes of images into the codebook: codes as close together as a trained model's may be."""
    codebook = model.quantizer.embedding
    images = pictures(-(-len(codebook) // encoder.num_tokens), model.image_size).to(codebook.device)
    z = torch.cat([encoder.latents(part).flatten(0, 1) for part in images.split(batch)])
    codebook.copy_(F.normalize(z.float(), dim=-1)[: len(codebook)])


def _random(config: TokenizerConfig, size: int, *, pixels: bool) -> SFTok:
    torch.manual_seed(0)
    model = SFTok(config, TeacherConfig(), size, pixels=pixels)
    model.initialise()
    return model
