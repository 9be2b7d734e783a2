"""What the samplers of all kinds of generators have in common. Pure: all randomness is in the numbers.

Shapes: B sequences, N codes per sequence.
"""

from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Tensor

from generator.code_space import CodeSpace


class SampledNetwork(Protocol):
    """Interface that every sampler needs of a network."""

    space: CodeSpace

    @property
    def device(self) -> torch.device:
        """Return the device that it computes on."""


class CodeSampler(ABC):
    """Sampler of micro-batches from one network with one config."""

    network: SampledNetwork
    numbers: tuple[int, ...]
    """shape of the uniform numbers per sample"""

    def __call__(self, class_B: Tensor, uniform: Tensor) -> Tensor:
        """Draw codes (B, N) int64 in the dataset's layout; `null_class` draws without a class.

        Args:
            class_B: class ids in [0, num_classes].
            uniform: numbers in [0, 1), shape (B, *numbers), float32 or float64.

        Raises:
            ValueError: class ids are out of range, or the numbers have another shape.
        """
        self.network.space.check_classes(class_B)
        if uniform.shape != (wanted := (len(class_B), *self.numbers)):
            raise ValueError(f"uniform numbers of shape {tuple(uniform.shape)}, not {wanted}: draw those")
        return self._draw(class_B.to(self.network.device), uniform.to(self.network.device)).clone()

    @abstractmethod
    def _draw(self, class_B: Tensor, uniform: Tensor) -> Tensor:
        """Draw codes (B, N) on the network's device."""
