"""Detect steps whose loss or gradient is not finite: skipped, counted on the device, reported when figures are fetched.

Checking a GPU after every step would synchronize the host each time and leave the GPU's queue empty.
"""

import math

import torch
from torch import Tensor

SKIPPED_IN_A_ROW = 40  # by then the loss scale has fallen from 2^16 to 2^-24, the smallest value of half precision


class Faults:
    """Detector of non-finite steps of one optimizer."""

    def __init__(self, device: torch.device, *, are_skipped: bool) -> None:
        """Choose whether such steps are skipped, as in half precision, where one overflows now and then."""
        self.are_skipped = are_skipped
        self._first = torch.tensor([-1.0, 0.0, 0.0], dtype=torch.float64, device=device)
        """step, loss and gradient norm of the first bad step; step -1: there was none."""
        self._skipped = torch.zeros(2, dtype=torch.float64, device=device)
        """number of bad steps in all, and of consecutive bad steps up to the last one."""

    def record(self, step: int, loss: Tensor, norm: Tensor) -> Tensor:
        """Record a step; return whether it is bad, as a bool tensor (): the optimizer must then change nothing."""
        is_bad = ~(loss.isfinite() & norm.isfinite())
        if self.are_skipped:
            skipped, in_a_row = self._skipped
            self._skipped = torch.stack([skipped + is_bad, (in_a_row + 1) * is_bad])
        else:
            this = torch.stack([self._first.new_full((), step), loss.double(), norm.double()])
            self._first = torch.where(is_bad & (self._first[0] < 0), this, self._first)
        return is_bad

    @property
    def figures(self) -> dict[str, Tensor]:
        """Return the figures to log: the number of skipped steps, if steps may be skipped."""
        return {"skipped_steps": self._skipped[0]} if self.are_skipped else {}

    @property
    def status(self) -> Tensor:
        """Return the values that `check` needs, on the device, float64 (3,)."""
        return torch.cat([self._skipped, self._skipped.new_zeros(1)]) if self.are_skipped else self._first

    def check(self, step: int, status: list[float]) -> None:
        """Stop the training if a bad step may not be skipped, or if too many in a row were.

        Args:
            step: the last step.
            status: the values of `status` after it.

        Raises:
            FloatingPointError: training must stop; names the step and what is not finite.
        """
        if self.are_skipped:
            if (in_a_row := int(status[1])) >= SKIPPED_IN_A_ROW:
                raise FloatingPointError(
                    f"step {step}: the loss or the gradient was not finite in the last {in_a_row} steps, all skipped; "
                    'lower the learning rate, or set training.precision to "bf16" or "fp32"'
                )
            return
        first, loss, norm = status
        if first < 0:
            return
        what = f"the gradient norm is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
        raise FloatingPointError(
            f"step {int(first)}: {what}; lower the learning rate, or look for a broken image or code in its batch"
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return the state for a checkpoint: empty if bad steps end the training."""
        return {"skipped_steps": self._skipped} if self.are_skipped else {}

    def load(self, skipped: Tensor) -> None:
        """Restore the state that `tensors` returned."""
        self._skipped = skipped.to(self._skipped.device)
