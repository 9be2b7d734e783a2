"""Decode in several steps: keep the most confident proxy codes, mask the rest and predict them again.

Shapes: B images, N latent tokens, P proxy positions, V proxy codes, D channels of a code.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sftok.model.noise import gumbel


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
