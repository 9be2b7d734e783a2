"""Agreement of each decoding step's prediction, and of the truth, with the last step's: figure 4a of the paper.

The paper states neither the direction nor the base of its KL. Here it is KL(step || final) in nats, the mean over all
positions, given or hidden; a step's prediction is the softmax of its logits without noise, the final one is the last
step's; the truth is the teacher's codes as one-hot vectors smoothed by 1e-6 (method.md 3).

Shapes: B images, P proxy positions, V proxy codes, T decoding steps.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from sftok.model.iterative_decoding import decode_steps

SMOOTHING = 1e-6  # of the truth's one-hot vectors: the share that is spread over all codes


@dataclass(frozen=True, eq=False)
class StepAgreement:
    """Sums over positions of KL and of equal top-1 codes, (T) float64 each; merged by `+`, in any order.

    Entry 0 is the truth, entry s is step s, from 1 to T - 1; all are compared with the last step.
    """

    positions: int
    kl_sums: Tensor
    equal_sums: Tensor

    @classmethod
    def of(cls, logits: Sequence[Tensor], truth_BP: Tensor) -> Self:
        """Compare the steps of some images, and the truth, with the last step.

        Args:
            logits: predictions of every step, (B, P, V) each, in the order of the steps.
            truth_BP: the teacher's codes, int64.

        Raises:
            ValueError: there are no steps, no images, or the truth has another shape.
        """
        if not logits or not truth_BP.numel() or logits[-1].shape[:2] != truth_BP.shape:
            shapes = [tuple(one.shape) for one in logits]
            raise ValueError(f"{len(logits)} steps of shapes {shapes} for codes {tuple(truth_BP.shape)}: nothing fits")
        final_BPV = logits[-1].float().log_softmax(-1)
        best_BP = final_BPV.argmax(-1)
        kl_sums = [kl_of_truth(truth_BP, final_BPV).double().sum()]
        equal_sums = [(truth_BP == best_BP).sum()]
        for step_BPV in logits[:-1]:
            kl_sums.append(kl_divergence(step_BPV.float().log_softmax(-1), final_BPV).double().sum())
            equal_sums.append((step_BPV.argmax(-1) == best_BP).sum())
        return cls(truth_BP.numel(), torch.stack(kl_sums).cpu(), torch.stack(equal_sums).double().cpu())

    def __add__(self, other: "StepAgreement") -> "StepAgreement":
        if len(self.kl_sums) != len(other.kl_sums):
            raise ValueError(f"{len(self.kl_sums)} and {len(other.kl_sums)} decoding steps cannot be merged")
        return StepAgreement(
            self.positions + other.positions, self.kl_sums + other.kl_sums, self.equal_sums + other.equal_sums
        )

    @property
    def kl(self) -> list[float]:
        """Nats per position: of the truth, then of the steps 1 to T - 1."""
        means: list[float] = (self.kl_sums / self.positions).tolist()
        return means

    @property
    def top1(self) -> list[float]:
        """Share of positions with the same likeliest code as the last step, in the same order."""
        means: list[float] = (self.equal_sums / self.positions).tolist()
        return means


def kl_divergence(log_p_BPV: Tensor, log_q_BPV: Tensor) -> Tensor:
    """Compute KL(p || q) of every position in nats, (B, P), clamped at 0 against rounding."""
    return (log_p_BPV.exp() * (log_p_BPV - log_q_BPV)).sum(-1).clamp(min=0)


def kl_of_truth(codes_BP: Tensor, log_q_BPV: Tensor) -> Tensor:
    """Compute KL(p || q), (B, P), for p with 1 - 1e-6 at the code plus 1e-6 spread over all codes.

    In float64 and without forming p: in float32, 1 - 1e-6 keeps two digits of its difference from 1.
    """
    num_codes = log_q_BPV.shape[-1]
    low = SMOOTHING / num_codes
    high = 1 - SMOOTHING + low
    entropy = -(high * math.log(high) + (num_codes - 1) * low * math.log(low))
    at_code_BP = log_q_BPV.gather(-1, codes_BP[..., None])[..., 0].double()
    cross_BP = -(high * at_code_BP + low * (log_q_BPV.double().sum(-1) - at_code_BP))
    return (cross_BP - entropy).clamp(min=0)


def decode_logits(
    decoder: Callable[[Tensor, Tensor], Tensor],
    first_ids_BP: Tensor,
    z_q_BND: Tensor,
    *,
    num_steps: int,
    temperature: float = 0.0,
    keys_B: Tensor | None = None,
) -> list[Tensor]:
    """Decode iteratively and return every step's logits (B, P, V); the arguments are those of `decode_steps`.

    All steps are in memory, since they are compared with the last one: T * B * P * V floats, 537 MB for 64 images with
    256 positions, 1,024 codes and 8 steps. The number of images given at once bounds it.
    """
    seen: list[Tensor] = []

    def noted(ids_BP: Tensor, given_BND: Tensor) -> Tensor:
        seen.append(decoder(ids_BP, given_BND))
        return seen[-1]

    decode_steps(noted, first_ids_BP, z_q_BND, num_steps=num_steps, temperature=temperature, keys_B=keys_B)
    return seen
