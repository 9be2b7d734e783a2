"""Sampling: class ids and uniform numbers in, codes out. Pure: all randomness is in the numbers.

Shapes: B sequences, N codes a sequence, V codebook size.
"""

import torch
from torch import Tensor

from generator.config import SampleConfig
from generator.model import Generator


def guide(cond_BV: Tensor, uncond_BV: Tensor, cfg_scale: float) -> Tensor:
    """Classifier-free guidance; 1 is conditional only, 0 unconditional only."""
    return uncond_BV + cfg_scale * (cond_BV - uncond_BV)


def filter_logits(logits_BV: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits, -inf outside the `top_k` most likely codes (0: all) and the smallest set that holds `top_p`."""
    if 0 < top_k < logits_BV.shape[-1]:
        threshold_B1 = logits_BV.topk(top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < threshold_B1, -torch.inf)
    if top_p < 1:
        sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
        probability_BV = sorted_BV.softmax(-1)
        # A code is kept while what lies before it holds less than top_p: the first is always kept.
        dropped_BV = probability_BV.cumsum(-1) - probability_BV >= top_p
        logits_BV = sorted_BV.masked_fill(dropped_BV, -torch.inf).gather(-1, order_BV.argsort(-1))
    return logits_BV


def draw(logits_BV: Tensor, uniform_B: Tensor, config: SampleConfig) -> Tensor:
    """One code a row, (B,) int64, by the inverse of the cumulative distribution at `uniform_B` in [0, 1)."""
    if config.temperature == 0:
        return logits_BV.argmax(-1)
    probability_BV = filter_logits(logits_BV.float() / config.temperature, config.top_k, config.top_p).softmax(-1)
    cumulative_BV = probability_BV.double().cumsum(-1)
    target_B1 = uniform_B.double()[:, None] * cumulative_BV[:, -1:]
    # Rounding may leave the target at the very end; the last code that has any probability is then meant.
    last_B = (probability_BV > 0).int().cumsum(-1).argmax(-1)
    return torch.minimum(torch.searchsorted(cumulative_BV, target_B1, right=True)[:, 0], last_B)


@torch.no_grad()
def sample(model: Generator, class_B: Tensor, uniform_BN: Tensor, config: SampleConfig) -> Tensor:
    """Draw codes (B, N) int64 for class ids (B,); `null_class` draws without a class.

    Args:
        model: in evaluation mode.
        class_B: class ids in [0, num_classes].
        uniform_BN: one number in [0, 1) a code, float32 or float64.
        config: guidance, temperature and filters.
    """
    batch, is_guided = len(class_B), config.cfg_scale != 1
    rows_B = torch.cat([class_B, torch.full_like(class_B, model.space.null_class)]) if is_guided else class_B
    cache = model.empty_cache(len(rows_B))
    x_BW = model.class_embed(rows_B)
    codes = []
    for position in range(model.space.num_tokens):
        logits_BV = model.step(x_BW, position, cache).float()
        if is_guided:
            logits_BV = guide(logits_BV[:batch], logits_BV[batch:], config.cfg_scale)
        code_B = draw(logits_BV, uniform_BN[:, position], config)
        codes.append(code_B)
        x_BW = model.code_embed(torch.cat([code_B, code_B]) if is_guided else code_B)
    return torch.stack(codes, dim=1)
