"""Draw codes from logits: guidance, top-k and nucleus filters, and inverse-transform sampling.

Shapes: B sequences, V codebook size, C chunks of S codes.
"""

import math

import torch
from torch import Tensor

from generator.config import SampleConfig

LIKELIEST = 1024
"""Number of most likely codes that are sorted first; whole rows are sorted only if these do not suffice."""
CHUNK = 128


def guide(cond: Tensor, uncond: Tensor, cfg_scale: float | Tensor) -> Tensor:
    """Apply classifier-free guidance; scale 1 is conditional only, 0 unconditional only."""
    return uncond + cfg_scale * (cond - uncond)


def guidance_scales(config: SampleConfig, steps: int) -> list[float]:
    """Return the guidance scale of every step (masked) or code (autoregressive).

    Progress is step / steps as published (method.md 1.5): growing schedules begin at 1 and end one step short of
    `cfg_scale`.
    """
    grown = {
        "constant": lambda _: 1.0,
        "linear": lambda progress: progress,
        "power_cosine": lambda progress: (1 - math.cos(math.pi * progress**config.cfg_power)) / 2,
    }[config.cfg_schedule]
    return [1 + (config.cfg_scale - 1) * grown(step / steps) for step in range(steps)]


def nucleus_floor(probability_BV: Tensor, top_p: float) -> Tensor:
    """Return the lowest probability in the smallest set of most likely codes that holds `top_p`, (B, 1).

    Only the most likely codes are sorted at first; rows in which these hold less than `top_p` are sorted as a whole,
    with identical sums, so that a row's result does not depend on which path it took.
    """
    size = probability_BV.shape[-1]
    # A compiled graph cannot branch on which rows suffice, and on a GPU it would synchronize the host.
    if torch.compiler.is_compiling() or probability_BV.is_cuda or size <= LIKELIEST:
        return _floor(probability_BV.sort(dim=-1, descending=True).values, top_p)[0]
    floor_B1, is_found_B = _floor(probability_BV.topk(LIKELIEST, dim=-1).values, top_p)
    if not is_found_B.all():
        rest_RV = probability_BV[~is_found_B].sort(dim=-1, descending=True).values
        floor_B1[~is_found_B] = _floor(rest_RV, top_p)[0]
    return floor_B1


def _floor(falling_BK: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Return the probability at which the falling ones reach `top_p` (B, 1), and whether they reach it (B,)."""
    before_BK = falling_BK.double().cumsum(-1) < top_p
    count_B1 = before_BK.sum(-1, keepdim=True)
    last = falling_BK.shape[-1] - 1
    return falling_BK.gather(-1, count_B1.clamp(max=last)), count_B1[:, 0] <= last


def filter_logits(logits_BV: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set logits to -inf outside the `top_k` most likely codes (0: all) and the smallest set of those with `top_p`.

    Codes as likely as the last one kept are kept too.

    Raises:
        ValueError: `top_k` is negative, or `top_p` is not in (0, 1].
    """
    if top_k < 0:
        raise ValueError(f"top_k = {top_k} is negative: give 0 to keep all codes")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p = {top_p} is not in (0, 1]: give 1 to keep all codes")
    if 0 < top_k < logits_BV.shape[-1]:
        threshold_B1 = logits_BV.topk(top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < threshold_B1, -torch.inf)
    if top_p < 1:
        probability_BV = logits_BV.float().softmax(-1)
        logits_BV = logits_BV.masked_fill(probability_BV < nucleus_floor(probability_BV, top_p), -torch.inf)
    return logits_BV


def invert(probability_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Draw one code per row, (B,) int64: the first at which the cumulative probability exceeds `uniform_B` in [0, 1).

    In two levels, chunks and then codes within one: sums over chunks are fast, cumulative sums over all codes are not.

    Nothing is padded with constants: compiled for CUDA by torch before 2.14, padding is lost if it is fused with the
    sum over it (pytorch#189895), and with up to 128 codes, one chunk, the first code was drawn every time.
    """
    missing = -probability_BV.shape[-1] % CHUNK
    if missing:
        probability_BV = torch.cat([probability_BV, probability_BV.new_zeros(len(probability_BV), missing)], dim=1)
    chunks_BCS = probability_BV.unflatten(-1, (-1, CHUNK))
    upper_BC = chunks_BCS.sum(-1, dtype=torch.float64).cumsum(-1)
    target_B1 = uniform_B.double()[:, None] * upper_BC[:, -1:]
    chunk_B1 = _first_above(upper_BC, target_B1)
    before_B1 = torch.where(chunk_B1 > 0, upper_BC.gather(1, (chunk_B1 - 1).clamp(min=0)), 0.0)
    within_BS = chunks_BCS.gather(1, chunk_B1[..., None].expand(-1, -1, CHUNK))[:, 0]
    inner_BS = before_B1 + within_BS.double().cumsum(-1)
    return (chunk_B1 * CHUNK + _first_above(inner_BS, target_B1))[:, 0]


def _first_above(rising_BS: Tensor, target_B1: Tensor) -> Tensor:
    """Find where rising sums first exceed the target, (B, 1); if rounding leaves none, where they rise last."""
    last_B1 = (rising_BS < rising_BS[:, -1:]).sum(-1, keepdim=True)
    return torch.minimum((rising_BS <= target_B1).sum(-1, keepdim=True), last_B1)


def draw(logits_BV: Tensor, uniform_B: Tensor, config: SampleConfig) -> Tensor:
    """Draw one code per row, (B,) int64, with the temperature and the filters of the config.

    Raises:
        ValueError: the temperature is negative.
    """
    if config.temperature < 0:
        raise ValueError(f"temperature = {config.temperature} is negative: give 0 to take the most likely code")
    if config.temperature == 0:
        return logits_BV.argmax(-1)
    return invert(_probability(logits_BV, config), uniform_B)


def misfit(logits_BV: Tensor, uniform_B: Tensor, code_B: Tensor, config: SampleConfig) -> Tensor:
    """Return how far, in probability, these numbers are from drawing these codes, (B,) float64; near 0 is rounding.

    At temperature 0: by how much the most likely code is more likely.
    """
    code_B1 = code_B[:, None]
    if config.temperature == 0:
        probability_BV = logits_BV.double().softmax(-1)
        return probability_BV.amax(-1) - probability_BV.gather(1, code_B1)[:, 0]
    probability_BV = _probability(logits_BV, config).double()
    upper_BV = probability_BV.cumsum(-1)
    upper_B = upper_BV.gather(1, code_B1)[:, 0]
    lower_B, target_B = upper_B - probability_BV.gather(1, code_B1)[:, 0], uniform_B.double() * upper_BV[:, -1]
    return torch.maximum(lower_B - target_B, target_B - upper_B).clamp(min=0)


def _probability(logits_BV: Tensor, config: SampleConfig) -> Tensor:
    filtered_BV = filter_logits(logits_BV.float() / config.temperature, config.top_k, config.top_p)
    return filtered_BV.softmax(-1)
