"""The interface that every kind of generator's network offers to training, validation and sampling.

Shapes: B sequences, N codes per sequence, V codebook size.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from generator.code_space import CodeSpace
from generator.config import AnyGeneratorConfig
from generator.dropout import Lines, drop, lines_of


class GeneratorNetwork(nn.Module, ABC):
    """Class-conditional model of codes; `blocks` are its layers."""

    config: AnyGeneratorConfig
    blocks: nn.ModuleList
    places_per_block: int
    """places in a block at which values are dropped."""

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

    def masks(self, keys_B: Tensor | None) -> Lines | None:
        """Return what decides the dropout masks of rows with these keys; None: nothing is dropped."""
        if keys_B is None or not self.config.dropout:
            return None
        positions = self.config.positions(self.space.num_tokens)
        places = 1 + len(self.blocks) * self.places_per_block
        return lines_of(keys_B, places, positions, max(self.config.width, positions))

    def drop_input(self, x_BSW: Tensor, masks: Lines | None) -> Tensor:
        """Drop from the embeddings, the first place of all."""
        return x_BSW if masks is None else drop(x_BSW, masks.lines[0], masks.constants, self.config.dropout)

    def through_blocks(self, x: Tensor, *others: Tensor, masks: Lines | None = None) -> Tensor:
        """Map hidden states by all blocks, which also take `others`, and the lines of their places if any drop."""
        for index, block in enumerate(self.blocks):
            first = 1 + index * self.places_per_block
            own = () if masks is None else (masks.lines[first : first + self.places_per_block], masks.constants)
            if self.recomputes and torch.is_grad_enabled():
                # Blocks draw no random numbers, so there is no generator state to restore.
                x = checkpoint(block, x, *others, *own, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, *others, *own)
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

    def row_weights(self, view_BN: Tensor | None, batch: int) -> Tensor:  # noqa: ARG002  # all rows weigh the same
        """Return the weights (B,) of a batch's rows in its loss, so that it does not depend on how the batch is cut."""
        return torch.ones(batch)

    @abstractmethod
    def training_loss(
        self,
        class_B: Tensor,
        codes_BN: Tensor,
        view_BN: Tensor | None,
        keys_B: Tensor | None = None,
        *,
        label_smoothing: float,
    ) -> Tensor:
        """Return the mean loss of a micro-batch, given its rows of the view, and of the keys of dropout if any."""

    @abstractmethod
    def draw_targets(self, codes_BN: Tensor, generator: torch.Generator) -> Tensor:
        """Choose the held-out codes to predict in validation, (B, N) bool."""

    @abstractmethod
    def predict(self, class_B: Tensor, codes_BN: Tensor, targets_BN: Tensor) -> Tensor:
        """Return logits (B, N, V) of the targets, given what the generator may see of the others."""
