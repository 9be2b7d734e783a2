"""The multi-step decoder: latent tokens to proxy codes, with the masking of its inputs in training and decoding.

Shapes: B images, N latent tokens, P proxy positions, V proxy codes, W width, D channels of a code.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sftok.config import MaskSchedule, TokenizerConfig
from sftok.model.noise import gumbel
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


def decode_steps(
    decoder: Callable[[Tensor, Tensor], Tensor],
    first_ids_BP: Tensor,
    z_q_BND: Tensor,
    *,
    num_steps: int,
    temperature: float = 0.0,
    keys_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Decode iteratively: predict all positions, keep the most confident ones, mask the rest again (method.md 1.4).

    Args:
        decoder: (ids (B, P), z_q) to logits (B, P, V).
        first_ids_BP: input of the first step, all masked; its value is the mask id.
        z_q_BND: quantized latent tokens.
        num_steps: decoder passes.
        temperature: scale of the Gumbel noise at the first step, falling linearly to 0; 0 is deterministic.
        keys_B: keys of the images' noise, int64, on their device; required if the temperature is not 0.

    Returns:
        Proxy codes (B, P) and the last step's logits (B, P, V).

    Raises:
        ValueError: the temperature is not 0 and there are no keys.
    """
    if temperature and keys_B is None:
        raise ValueError(f"temperature = {temperature} needs a noise key per image: pass keys_B")
    ids_BP, mask_id, num_positions = first_ids_BP, first_ids_BP[0, 0], first_ids_BP.shape[1]
    places_P = torch.arange(num_positions, device=first_ids_BP.device)
    for step in range(num_steps):
        progress = (step + 1) / num_steps
        scale = temperature * (1 - progress)
        hidden_BP = ids_BP == mask_id
        logits_BPV = decoder(ids_BP, z_q_BND).float()
        noisy_BPV = logits_BPV
        if scale and keys_B is not None:
            noisy_BPV = logits_BPV + scale * gumbel(keys_B, 2 * step, tuple(logits_BPV.shape[1:]))
        candidate_BP = torch.where(hidden_BP, noisy_BPV.argmax(-1), ids_BP)
        if step == num_steps - 1:
            break
        confidence_BP = logits_BPV.gather(-1, candidate_BP[..., None])[..., 0].masked_fill(~hidden_BP, math.inf)
        if scale and keys_B is not None:
            confidence_BP = confidence_BP + scale * gumbel(keys_B, 2 * step + 1, (num_positions,))
        # Deviates: by rank and per image; the published code takes the count of image 0 and masks all ties.
        count_B = hidden_BP.sum(1) - 1
        wanted = math.floor(num_positions * math.acos(progress) / (math.pi / 2))
        order_BP = confidence_BP.argsort(dim=1, stable=True)
        rank_BP = torch.empty_like(order_BP).scatter_(1, order_BP, places_P.expand_as(order_BP))
        # No value is read back from the device, so that all steps are queued on a GPU at once.
        ids_BP = torch.where(rank_BP < count_B.clamp(max=max(wanted, 1))[:, None], mask_id, candidate_BP)
    return candidate_BP, logits_BPV
