"""Cross-entropy on proxy codes, and the loss of the teacher's codebook.

Shapes: B images, P proxy positions, V proxy codes.
"""

import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-8


def proxy_loss(
    logits_BPV: Tensor, proxy_BP: Tensor, hidden_BP: Tensor, *, unmasked_weight: float, label_smoothing: float
) -> Tensor:
    """Compute the mean cross-entropy on the teacher's codes: weight 1 where masked, `unmasked_weight` elsewhere."""
    loss_BP = F.cross_entropy(
        logits_BPV.float().transpose(1, 2), proxy_BP, reduction="none", label_smoothing=label_smoothing
    )
    weight_BP = hidden_BP.float() + unmasked_weight * (~hidden_BP).float()
    return (loss_BP * weight_BP).sum() / (weight_BP.sum() + EPSILON)


def vq_loss(latents: Tensor, quantized: Tensor, commitment_weight: float) -> Tensor:
    """Compute the codebook loss plus weighted commitment of a VQ-VAE; any equal shapes."""
    return F.mse_loss(quantized, latents.detach()) + commitment_weight * F.mse_loss(latents, quantized.detach())
