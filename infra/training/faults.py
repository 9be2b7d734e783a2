"""Steps whose loss or gradient is not finite: left out, counted on the device, and told of when figures are fetched.

To ask a GPU after every step whether all is finite would have the host wait for it every time, with nothing queued.
"""

import math

import torch
from torch import Tensor

SKIPPED_IN_A_ROW = 40  # by then the scale of losses has come down from 2^16 to 2^-24, and half precision has no less


class Faults:
    """What was not finite in the steps of one optimizer."""

    def __init__(self, device: torch.device, *, are_skipped: bool) -> None:
        """Take whether such steps are passed, as in half precision, where now and then one overflows."""
        self.are_skipped = are_skipped
        self._first = torch.tensor([-1.0, 0.0, 0.0], dtype=torch.float64, device=device)
        """step, loss and norm of the gradient of the first bad step; step -1: there was none."""
        self._skipped = torch.zeros(2, dtype=torch.float64, device=device)
        """bad steps in all, and how many the last ones were in a row."""

    def note(self, step: int, loss: Tensor, norm: Tensor) -> Tensor:
        """Note a step; whether it is bad, as a bool tensor (): the optimizer must then leave everything as it is."""
        is_bad = ~(loss.isfinite() & norm.isfinite())
        if self.are_skipped:
            skipped, in_a_row = self._skipped
            self._skipped = torch.stack([skipped + is_bad, (in_a_row + 1) * is_bad])
        else:
            seen = torch.stack([self._first.new_full((), step), loss.double(), norm.double()])
            self._first = torch.where(is_bad & (self._first[0] < 0), seen, self._first)
        return is_bad

    @property
    def figures(self) -> dict[str, Tensor]:
        """What is to be logged: the number of steps left out, where any may be."""
        return {"skipped_steps": self._skipped[0]} if self.are_skipped else {}

    @property
    def told(self) -> Tensor:
        """What `check` wants to see, float64 (3,)."""
        return torch.cat([self._skipped, self._skipped.new_zeros(1)]) if self.are_skipped else self._first

    def check(self, step: int, told: list[float]) -> None:
        """Stop the training if it has come to a step that it must not pass.

        Args:
            step: the last one.
            told: the values of `told` after it.

        Raises:
            FloatingPointError: names the step and what is not finite.
        """
        if self.are_skipped:
            if (in_a_row := int(told[1])) >= SKIPPED_IN_A_ROW:
                raise FloatingPointError(
                    f"step {step}: the loss or the gradient was not finite in the last {in_a_row} steps, all left out; "
                    'lower the learning rate, or set training.precision to "bf16" or "fp32"'
                )
            return
        first, loss, norm = told
        if first < 0:
            return
        what = f"the norm of the gradient is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
        raise FloatingPointError(
            f"step {int(first)}: {what}; lower the learning rate, or look for a broken image or code in its batch"
        )

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint needs: nothing where a bad step ends the training."""
        return {"skipped_steps": self._skipped} if self.are_skipped else {}

    def load(self, skipped: Tensor) -> None:
        """Restore what `tensors` gave."""
        self._skipped = skipped.to(self._skipped.device)
