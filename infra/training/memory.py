"""State the memory of a GPU that a training takes, by part: what is held for each parameter, and what a pass adds.

Weights, gradients, the optimizer's two moments and the EMA are float32. Replicas hold all of them; shards hold a part,
and gather the weights of two blocks at a time: the one that is computed and the next.
"""

from typing import NamedTuple

from infra.training.config import Parallel, TrainingConfig

FLOAT = 4  # bytes
RESERVED = 1_000_000_000
"""Bytes of a GPU that are left to CUDA's context, the workspaces of its libraries and what is lost between tensors."""


class MemoryNeed(NamedTuple):
    """Bytes that a training takes on each GPU."""

    weights: int = 0
    """with those of frozen networks."""
    gradients: int = 0
    moments: int = 0
    ema: int = 0
    best: int = 0
    """the EMA of the best validation, where that is kept."""
    activations: int = 0
    """what a micro-batch adds until its gradients are there, without what the size of the vocabulary adds."""
    logits: int = 0
    gathered: int = 0
    """of shards: weights and gradients of the blocks at hand."""
    inputs: int = 0

    @property
    def total(self) -> int:
        """Return all bytes together."""
        return sum(self)

    def parts(self) -> dict[str, int]:
        """Return the parts that there are, the largest first."""
        named = self._asdict().items()
        return dict(sorted(((name, size) for name, size in named if size), key=lambda part: -part[1]))

    def fits(self, card: int) -> bool:
        """Tell whether a GPU of so many bytes has room."""
        return self.total + RESERVED <= card


class Parameters(NamedTuple):
    """Numbers of parameters of a training's networks."""

    trained: int
    block: int = 0
    """of the largest block that is gathered at a time, if they are sharded."""
    outside: int = 0
    """of what is outside of the blocks."""
    frozen: int = 0


class Spread(NamedTuple):
    """How ranks share the parameters of a training."""

    ranks: int = 1
    sharded_over: int = 1
    """ranks that hold the parts of one copy; 1: each rank holds all."""

    @classmethod
    def of(cls, kind: Parallel, ranks: int, ranks_per_node: int | None = None) -> "Spread":
        """Return how ranks share parameters.

        Args:
            kind: ddp, fsdp or hsdp; what "auto" stands for depends on the network.
            ranks: over all nodes.
            ranks_per_node: on each; None: all on one.
        """
        if ranks == 1 or kind == "ddp":
            return cls(ranks)
        return cls(ranks, ranks if kind == "fsdp" else min(ranks, ranks_per_node or ranks))

    @property
    def is_sharded(self) -> bool:
        """Return whether ranks hold parts of the parameters."""
        return self.sharded_over > 1

    def has_gradients(self, micro_batches: int) -> bool:
        """Tell whether gradients are there while a pass goes on: of micro-batches before, or as buckets of replicas."""
        return self.ranks > 1 or micro_batches > 1


def held(parameters: Parameters, config: TrainingConfig, spread: Spread, *, keeps_best: bool = True) -> MemoryNeed:
    """Return what is held for each parameter of a network, and gathered of shards.

    Args:
        parameters: of the network, and of frozen ones beside it.
        config: of the training.
        spread: how ranks share the parameters.
        keeps_best: whether the network has a copy of the best EMA, if the config asks for one.
    """
    own = FLOAT * -(-parameters.trained // spread.sharded_over)
    best = own if keeps_best and config.keep == "best" else 0
    need = MemoryNeed(own + FLOAT * parameters.frozen, own, 2 * own, own, best)
    if not spread.is_sharded:
        return need
    used = 2 if config.precision == "bf16" else FLOAT  # bytes of a parameter as it is gathered
    block, outside = parameters.block, parameters.outside
    in_blocks = used * (outside + 2 * block) + used * (outside + block) + FLOAT * 2 * block
    at_the_end = used * (outside + block) + used * outside + FLOAT * (outside + block)
    return need._replace(gathered=max(in_blocks, at_the_end))
