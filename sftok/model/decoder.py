"""The multi-step decoder: latent tokens to proxy codes, with the masking of its inputs in training.

Shapes: B images, N latent tokens, P proxy positions, V proxy codes, W width, D channels of a code.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sftok.config import MaskSchedule, TokenizerConfig
from sftok.model.transformer import Transformer, free_parameter


class Decoder(nn.Module):
    """Predicts the proxy codes of all positions from the latent tokens and the proxy codes that are not masked."""

    def __init__(self, config: TokenizerConfig, num_positions: int, proxy_codebook_size: int) -> None:
        super().__init__()
        width = config.decoder.width
        self.mask_id, self.num_positions = proxy_codebook_size, num_positions
        self.proxy_embed = nn.Embedding(proxy_codebook_size + 1, width)
        self.class_token = free_parameter(1, width)
        self.proxy_positions = free_parameter(1 + num_positions, width)
        self.latent_embed = nn.Linear(config.code_dim, width)
        self.latent_positions = free_parameter(config.num_latent_tokens, width)
        self.transformer = Transformer(config.decoder)
        self.head = nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, proxy_codebook_size))

    def forward(self, ids_BP: Tensor, z_q_BND: Tensor) -> Tensor:
        """Proxy codes (B, P) int64, `mask_id` where hidden, and z_q (B, N, D), to logits (B, P, V)."""
        sequence_BSW = self.sequence(ids_BP, self.latents(z_q_BND))
        return self.head(self.transformer(sequence_BSW, self.kept))

    @property
    def kept(self) -> slice:
        """The proxy positions in the sequence, the only ones that are kept."""
        return slice(1, 1 + self.num_positions)

    def latents(self, z_q_BND: Tensor) -> Tensor:
        """Embed latent tokens, (B, N, W): the same in every decoding step of an image."""
        return self.latent_embed(z_q_BND) + self.latent_positions

    def sequence(self, ids_BP: Tensor, latent_BNW: Tensor) -> Tensor:
        """Build the transformer's input (B, 1 + P + N, W): class, proxy codes, latent tokens."""
        proxy_BPW = self.proxy_embed(ids_BP)
        class_B1W = self.class_token.expand(len(ids_BP), 1, -1).to(proxy_BPW.dtype)
        proxy_BSW = torch.cat([class_B1W, proxy_BPW], dim=1) + self.proxy_positions
        return torch.cat([proxy_BSW, latent_BNW.to(proxy_BSW.dtype)], dim=1)

    def all_masked(self, z_q_BND: Tensor) -> Tensor:
        """Return the first step's input: every position masked, (B, P)."""
        return torch.full((len(z_q_BND), self.num_positions), self.mask_id, device=z_q_BND.device)


MASK_RATIOS: dict[MaskSchedule, Callable[[Tensor, float], Tensor]] = {
    "arccos": lambda t, power: (torch.arccos(t) / (math.pi / 2)) ** power,
    "cosine": lambda t, _: (1 + torch.cos(math.pi * t)) / 2,
    "linear": lambda t, _: 1 - t,
    "quadratic": lambda t, power: (1 - t) ** power,
    "cubic": lambda t, _: (1 - t) ** 3,
    "exponential": lambda t, power: torch.exp(-power * t),
}
"""Mask ratio at time t in [0, 1] by schedule: 1 at t = 0. Some schedules ignore the power.

The published quadratic schedule takes the power as its exponent, so it is quadratic at power = 2 only."""


def random_mask(
    shape: torch.Size, generator: torch.Generator, schedule: MaskSchedule = "arccos", power: float = 1.0
) -> Tensor:
    """Draw a training mask (B, P), true = masked: the ratio by the schedule, the positions uniformly."""
    ratio_B = MASK_RATIOS[schedule](torch.rand(shape[0], generator=generator), power)
    count_B = (ratio_B * shape[1]).round()
    rank_BP = torch.rand(shape, generator=generator).argsort(1).argsort(1)
    return rank_BP < count_B[:, None]
