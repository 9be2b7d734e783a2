"""Configs of optimizers and training loops; imports no torch, so that the command line starts fast."""

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, PositiveInt, model_validator

from infra.config import RUNTIME, Config, Precision

Parallel = Literal["auto", "ddp", "fsdp", "hsdp"]
"""How ranks share the weights of a network."""

MOST_NAMED = 6  # numbers of ranks that are listed in full
COMPILED_WIDTH = 512  # narrower networks finish training before compiling them would pay


class OptimizerConfig(Config):
    """AdamW with a linear warm-up and a cosine decay, gradient clipping and an EMA of the weights."""

    model_config = ConfigDict(allow_inf_nan=False)

    lr: float = Field(1e-4, gt=0, description="learning rate after the warm-up")
    end_lr: float = Field(1e-5, ge=0, description="learning rate at the last step")
    warmup_steps: int = Field(10_000, ge=0, description="steps of the linear warm-up from 0")
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = Field(1e-4, ge=0, description="on matrices only: not on biases, norms and embeddings")
    grad_clip: float = Field(1.0, gt=0, description="largest gradient norm; larger gradients are scaled down to it")
    ema_decay: float = Field(
        0.999,
        ge=0,
        lt=1,
        description="upper bound of the EMA's decay, which is min((1 + s) / (10 + s), ema_decay) at step s",
    )


class LoopConfig(Config):
    """Length of a training loop, and intervals of checkpoints, logs and validations."""

    model_config = ConfigDict(allow_inf_nan=False)

    steps: PositiveInt = Field(description="optimizer steps")
    checkpoint_every: Annotated[PositiveInt, RUNTIME] = Field(500, description="steps between checkpoints")
    keep_checkpoints: Annotated[PositiveInt, RUNTIME] = Field(1, description="number of newest checkpoints to keep")
    log_every: Annotated[PositiveInt, RUNTIME] = Field(10, description="steps between logged lines")
    validate_every: int = Field(0, ge=0, description="steps between validations; 0 validates at the end only")
    keep: Literal["best", "last"] = Field(
        "last",
        description="publish the EMA weights of the best validation (checkpoints contain them) or of the last step",
    )


class TrainingConfig(LoopConfig):
    """Length, batch and optimizer of a training stage."""

    batch_size: PositiveInt = Field(description="images or sequences per step, over all ranks")
    micro_batch: int = Field(
        0,
        ge=0,
        description="images or sequences per forward pass; 0: the whole batch. Ranks share the micro-batches of "
        "a step and accumulate their gradients, so that the number of ranks changes results by rounding only",
    )
    optimizer: OptimizerConfig
    precision: Precision = Field("fp32", description="autocast type of the forward pass; with fp16 losses are scaled")
    compile: bool | None = Field(
        None,
        description="compile the networks' blocks; null: on CUDA, if the networks are large enough to gain from it",
    )
    activation_checkpointing: Annotated[bool, RUNTIME] = Field(
        False, description="recompute transformer blocks in the backward pass instead of storing their activations"
    )

    @model_validator(mode="after")
    def _batch_divides(self) -> Self:
        if self.micro_batch and self.batch_size % self.micro_batch:
            raise ValueError(f"batch_size = {self.batch_size} is not a multiple of micro_batch = {self.micro_batch}")
        return self

    def on(self, device: str, *, width: int) -> Self:
        """Resolve the setting that depends on the device and the width of the network: `compile`."""
        pays = device.startswith("cuda") and width >= COMPILED_WIDTH
        return self.model_copy(update={"compile": pays}) if self.compile is None else self

    @property
    def micro_batches(self) -> int:
        """Return the number of forward passes per step, over all ranks."""
        return self.batch_size // (self.micro_batch or self.batch_size)

    @property
    def rank_counts(self) -> list[int]:
        """Return the numbers of ranks that can share a step's micro-batches equally."""
        return divisors(self.micro_batches)

    @property
    def at_once(self) -> int:
        """Return the number of images or sequences per forward pass, also in validations."""
        return self.micro_batch or self.batch_size


def or_list(numbers: Sequence[int]) -> str:
    """Write a choice of numbers: 1, 2, 4 or 8; the middle of a long one is left out."""
    words = [str(number) for number in numbers]
    if len(words) > MOST_NAMED:
        return f"{', '.join(words[: MOST_NAMED - 2])} ... {words[-1]}"
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def divisors(number: int) -> list[int]:
    """Return the divisors of a number, from 1 on."""
    return [each for each in range(1, number + 1) if number % each == 0]
