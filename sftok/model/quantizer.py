"""The quantizer: continuous latent tokens to the nearest of K normalised codes (OptVQ; method.md 1.1).

Shapes: B images, N latent tokens, M = B * N, K codes, D channels of a code.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sftok.config import Assignment, TokenizerConfig

SINKHORN_ITERATIONS = 5
SINKHORN_SHARPNESS = 10.0
COMMITMENT_WEIGHT = 0.25
EPSILON = 1e-8


class QuantizerOutput(NamedTuple):
    """Output of the quantizer."""

    z_q: Tensor
    """(B, N, D), l2-normalised code vectors; gradients pass straight through to z."""
    codes: Tensor
    """(B, N) int64 in [0, K)."""
    loss: Tensor
    """Scalar: commitment_weight * commitment + codebook loss."""


@torch.no_grad()
def sinkhorn(distance_MK: Tensor) -> Tensor:
    """Assign the M vectors of a batch to the K codes in a balanced way: probabilities times M, (M, K).

    Every code is used about equally often in the batch (OptVQ), so a vector's code depends on its batch mates.
    """
    # No standardisation: the published line only subtracts the minimum, which scaling cancels. Kept, because the
    # published weights were trained with it.
    kernel_MK = (distance_MK - distance_MK.min()).mul_(-SINKHORN_SHARPNESS).exp_()
    M, K = kernel_MK.shape
    # The plan is always the kernel with scaled rows and columns. Carrying the scales instead of the plan, an iteration
    # is two matrix-vector products, where the published one writes the matrix six times.
    row_M = (kernel_MK.sum() + EPSILON).reciprocal().expand(M)
    column_K = kernel_MK.new_ones(K)
    for _ in range(SINKHORN_ITERATIONS):
        column_K = column_K / (column_K * (row_M @ kernel_MK) + EPSILON) / K
        row_M = row_M / (row_M * (kernel_MK @ column_K) + EPSILON) / M
    return kernel_MK.mul_(column_K).mul_(row_M[:, None] * M)


def assign(z_MD: Tensor, codebook_KD: Tensor, assignment: Assignment) -> Tensor:
    """Assign unit vectors (M, D) float32 to codes (M,) int64 of a float32 codebook."""
    similarity_MK = z_MD @ codebook_KD.T
    if assignment == "nearest":
        return similarity_MK.argmax(1)  # on the unit sphere the nearest is the most similar
    distance_MK = similarity_MK.mul_(-2).add_(2).clamp_min_(0).sqrt_()
    return sinkhorn(distance_MK).argmax(1)


class Quantizer(nn.Module):
    """Codebook on the unit sphere; a linear layer shared by all codes moves the whole codebook in every step."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(config.codebook_size, config.code_dim))
        self.shared_linear = nn.Linear(config.code_dim, config.code_dim)

    def initialise(self) -> None:
        """Initialise the embedding uniformly in +-1/K and the shared linear layer as the identity."""
        bound = 1 / self.embedding.shape[0]
        nn.init.uniform_(self.embedding, -bound, bound)
        nn.init.eye_(self.shared_linear.weight)
        nn.init.zeros_(self.shared_linear.bias)

    def codebook(self) -> Tensor:
        """Compute the effective codes, (K, D) float32 of unit length."""
        return F.normalize(self.shared_linear(self.embedding), dim=-1)

    def lookup(self, codes_BN: Tensor) -> Tensor:
        """Look up codes (B, N) int64: z_q (B, N, D)."""
        return F.embedding(codes_BN, self.codebook())

    @torch.autocast("cpu", enabled=False)
    @torch.autocast("cuda", enabled=False)
    def forward(self, z_BND: Tensor, assignment: Assignment) -> QuantizerOutput:
        """Quantize z (B, N, D); in float32 whatever the autocast, because near-ties decide codes."""
        codebook_KD, z_BND = self.codebook(), F.normalize(z_BND.float(), dim=-1)
        with torch.no_grad():
            codes_BN = assign(z_BND.flatten(0, 1), codebook_KD, assignment).view(z_BND.shape[:2])
        code_BND = F.embedding(codes_BN, codebook_KD)
        commitment = F.mse_loss(z_BND, code_BND.detach())
        loss = COMMITMENT_WEIGHT * commitment + F.mse_loss(code_BND, z_BND.detach())
        return QuantizerOutput(z_BND + (code_BND - z_BND).detach(), codes_BN, loss)
