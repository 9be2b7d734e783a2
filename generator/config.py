"""What a generator is, how it is trained and how it is sampled, as data."""

from typing import Self

from pydantic import Field, PositiveInt, model_validator

from infra.config import Config
from infra.schedule import TrainingConfig


class GeneratorConfig(Config):
    """Decoder-only class-conditional transformer; vocabulary, length and classes come from the code dataset."""

    width: PositiveInt = Field(768, description="model width")
    layers: PositiveInt = Field(12, description="transformer blocks")
    heads: PositiveInt = Field(12, description="attention heads")
    ffn_width: PositiveInt = Field(2048, description="hidden width of the SwiGLU feed-forward layer")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout of embeddings, residuals and feed-forward in training")
    qk_norm: bool = Field(False, description="normalise queries and keys a head")

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width = {self.width} does not divide by 2 * heads = {2 * self.heads}: rotary positions need pairs"
            )
        return self


class GeneratorTrainingConfig(TrainingConfig):
    """Length, batch and regularisation of generator training."""

    class_dropout: float = Field(
        0.1, ge=0, lt=1, description="share of labels replaced by the null class, for guidance"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1)


class SampleConfig(Config):
    """How codes are drawn."""

    per_class: PositiveInt = Field(50, description="samples of every class")
    cfg_scale: float = Field(1.0, ge=0, description="guidance; 1 is conditional only: uncond + scale * (cond - uncond)")
    temperature: float = Field(1.0, ge=0, description="0 takes the most likely code")
    top_k: int = Field(0, ge=0, description="keep the k most likely codes; 0 keeps all")
    top_p: float = Field(
        1.0, gt=0, le=1, description="keep the most likely codes that hold this probability; 1 keeps all"
    )
    micro_batch: PositiveInt = Field(
        64, description="samples drawn at once; fixed, since products of other shapes round otherwise"
    )
    samples_per_shard: PositiveInt = Field(256, description="rows a sample shard")
