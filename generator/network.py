"""The interface that every kind of generator's network offers to training, validation and sampling.

Shapes: B sequences, N codes per sequence, V codebook size.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from generator.code_space import CodeSpace
from generator.config import AnyGeneratorConfig


class GeneratorNetwork(nn.Module, ABC):
    """Class-conditional model of codes; `blocks` are its layers."""

    config: AnyGeneratorConfig
    blocks: nn.ModuleList

    def __init__(self, config: AnyGeneratorConfig, space: CodeSpace) -> None:
        super().__init__()
        self.config, self.space, self.recomputes = config, space, False

    @property
    def device(self) -> torch.device:
        """Return the device of the weights."""
        return next(self.parameters()).device

    def recompute(self, on: bool) -> None:
        """Enable or disable activation checkpointing of blocks; gradients do not change."""
        self.recomputes = on

    def through_blocks(self, x: Tensor, *others: Tensor) -> Tensor:
        """Map hidden states by all blocks, which also take `others`."""
        for block in self.blocks:
            if self.recomputes and torch.is_grad_enabled():
                x = checkpoint(block, x, *others, use_reentrant=False)
            else:
                x = block(x, *others)
        return x

    def check_length(self, codes_BN: Tensor) -> None:
        """Raise a ValueError if the number of codes per sequence is wrong."""
        if (count := codes_BN.shape[1]) != self.space.num_tokens:
            raise ValueError(f"{count} codes per sequence, but the generator has {self.space.num_tokens}")

    def place_tables(self) -> None:
        """Compute the buffers that are not learned, if any, in float32 whatever the type of the weights."""

    @abstractmethod
    def initialise(self) -> None:
        """Initialise the weights."""

    @abstractmethod
    def draw_view(self, batch: int, *, step: int, generator: torch.Generator) -> Tensor | None:
        """Draw what is random in a training step, for the whole batch (B, N): masks, orders, or nothing."""

    @abstractmethod
    def training_loss(
        self, class_B: Tensor, codes_BN: Tensor, view_BN: Tensor | None, *, label_smoothing: float
    ) -> Tensor:
        """Return the mean loss of a micro-batch, given its rows of the view."""

    @abstractmethod
    def draw_targets(self, codes_BN: Tensor, generator: torch.Generator) -> Tensor:
        """Choose the held-out codes to predict in validation, (B, N) bool."""

    @abstractmethod
    def predict(self, class_B: Tensor, codes_BN: Tensor, targets_BN: Tensor) -> Tensor:
        """Return logits (B, N, V) of the targets, given what the generator may see of the others."""
