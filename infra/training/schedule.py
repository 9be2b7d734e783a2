"""How long and how fast a training stage learns, as data; imports no torch, so that the command line starts fast."""

from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, PositiveInt, model_validator

from infra.config import RUNTIME, Config, Precision

COMPILED_WIDTH = 512  # narrower networks are trained before they are compiled


class OptimizerConfig(Config):
    """AdamW with a linear warm-up and a cosine decay, gradient clipping and an average of the weights."""

    model_config = ConfigDict(allow_inf_nan=False)

    lr: float = Field(1e-4, gt=0, description="learning rate after the warm-up")
    end_lr: float = Field(1e-5, ge=0, description="learning rate at the last step")
    warmup_steps: int = Field(10_000, ge=0, description="steps of the linear warm-up from 0")
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = Field(1e-4, ge=0, description="on matrices only: not on biases, norms and embeddings")
    grad_clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    ema_decay: float = Field(
        0.999, ge=0, lt=1, description="upper bound of the decay min((1 + s) / (10 + s), ema_decay)"
    )


class LoopConfig(Config):
    """How long a loop runs and how often it saves and logs."""

    model_config = ConfigDict(allow_inf_nan=False)

    steps: PositiveInt = Field(description="optimizer steps")
    checkpoint_every: Annotated[PositiveInt, RUNTIME] = Field(1000, description="steps between checkpoints")
    keep_checkpoints: Annotated[PositiveInt, RUNTIME] = Field(1, description="newest checkpoints that are kept")
    log_every: Annotated[PositiveInt, RUNTIME] = Field(10, description="steps between logged lines")
    validate_every: int = Field(0, ge=0, description="steps between validations; 0 validates at the end only")
    keep: Literal["best", "last"] = Field(
        "last",
        description="publish the averaged weights of the best validation (checkpoints carry them) or of the last step",
    )


class TrainingConfig(LoopConfig):
    """Length, batch and optimizer of a training stage."""

    batch_size: PositiveInt = Field(description="images or sequences a step, over all ranks")
    micro_batch: int = Field(
        0,
        ge=0,
        description="images or sequences a forward pass; 0: the whole batch. Ranks share the micro-batches of "
        "a step and accumulate theirs, so that results do not depend on the number of ranks but for rounding",
    )
    optimizer: OptimizerConfig
    precision: Precision = Field("fp32", description="autocast type of the forward pass; with fp16 losses are scaled")
    compile: bool | None = Field(
        None,
        description="compile the networks' blocks; not given: on CUDA, for networks that are large enough to gain",
    )
    activation_checkpointing: Annotated[bool, RUNTIME] = Field(
        False, description="compute transformer blocks again in the backward pass instead of keeping what they hold"
    )

    @model_validator(mode="after")
    def _batch_divides(self) -> Self:
        if self.micro_batch and self.batch_size % self.micro_batch:
            raise ValueError(f"batch_size = {self.batch_size} does not divide by micro_batch = {self.micro_batch}")
        return self

    def on(self, device: str, *, width: int) -> Self:
        """Settle what depends on the device, and on the width of the network: compilation."""
        pays = device.startswith("cuda") and width >= COMPILED_WIDTH
        return self.model_copy(update={"compile": pays}) if self.compile is None else self

    @property
    def micro_batches(self) -> int:
        """Forward passes a step, over all ranks."""
        return self.batch_size // (self.micro_batch or self.batch_size)

    @property
    def at_once(self) -> int:
        """Images or sequences a forward pass, in validations too."""
        return self.micro_batch or self.batch_size
