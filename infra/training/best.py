"""Keep the EMA weights of the best validation of a training run."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from infra.training.learner import Learner
from infra.training.parallel import own_part


class BestWeights:
    """The EMA weights of the best validation so far."""

    def __init__(self, learner: Learner, metric: str, *, higher: bool) -> None:
        self.learner, self.metric, self.sign = learner, metric, 1.0 if higher else -1.0
        self.value = torch.tensor(-math.inf, dtype=torch.float64)
        self.weights = {name: t.clone() for name, t in learner.ema.items()}

    def offer(self, figures: Mapping[str, float]) -> None:
        """Keep a copy of the learner's EMA weights if the metric has improved."""
        value = self.sign * figures[self.metric]
        if value > float(self.value):
            self.value.fill_(value)
            torch._foreach_copy_(list(self.weights.values()), list(self.learner.ema.values()))

    @property
    def best(self) -> float:
        """Return the metric of the kept weights."""
        return self.sign * float(self.value)

    def restore(self) -> None:
        """Copy the kept weights into the learner's EMA."""
        torch._foreach_copy_(list(self.learner.ema.values()), list(self.weights.values()))

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that a checkpoint needs, by name."""
        return {"value": self.value, **{f"best.{n}": self.learner.as_saved(n, t) for n, t in self.weights.items()}}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the state that `tensors` returned."""
        self.value.copy_(tensors["value"])
        for name, weight in self.weights.items():
            weight.copy_(own_part(tensors[f"best.{name}"]))
