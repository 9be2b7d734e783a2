"""Configs of generators, their training and their sampling."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import ConfigDict, Discriminator, Field, NonNegativeInt, PositiveInt, Tag, model_validator

from infra.compute.device import default_precision
from infra.config import RUNTIME, Config
from infra.training.config import Parallel, TrainingConfig

SamplePrecision = Literal["fp32", "bf16"]
GuidanceSchedule = Literal["constant", "linear", "power_cosine"]


class NaturalOrder(Config):
    """Codes in the dataset's order."""

    kind: Literal["natural"] = "natural"


class FixedOrder(Config):
    """Codes in one random order, the same in training and sampling."""

    kind: Literal["fixed"] = "fixed"
    seed: int = Field(0, description="seed of the order")


class AnnealedOrder(Config):
    """A random order per sequence, annealed to the natural order during training (RAR, method.md 1.5)."""

    kind: Literal["annealed"] = "annealed"
    start_step: int = Field(ge=0, description="training step up to which every order is random")
    end_step: PositiveInt = Field(description="training step from which every order is natural; linear in between")

    @model_validator(mode="after")
    def _ends_after_start(self) -> Self:
        if self.end_step < self.start_step:
            raise ValueError(f"end_step = {self.end_step} is before start_step = {self.start_step}: make it later")
        return self


Order = Annotated[NaturalOrder | FixedOrder | AnnealedOrder, Field(discriminator="kind")]


class GeneratorConfig(Config):
    """Decoder-only class-conditional transformer; vocabulary, length and classes come from the code dataset."""

    without: ClassVar = ("num_steps", "annealing")
    """settings of sampling that have no effect"""

    kind: Literal["autoregressive"] = "autoregressive"
    width: PositiveInt = Field(768, description="model width")
    layers: PositiveInt = Field(12, description="transformer blocks")
    heads: PositiveInt = Field(12, description="attention heads")
    ffn_width: PositiveInt = Field(2048, description="hidden width of the SwiGLU feed-forward layer")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout of embeddings and residuals in training")
    qk_norm: bool = Field(False, description="normalise queries and keys, per head")
    tied: bool = Field(False, description="share weights between the code embedding and the output head")
    order: Order = Field(NaturalOrder(), description="order in which codes are generated")

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width = {self.width} is not a multiple of 2 * heads = {2 * self.heads}: rotary positions need pairs"
            )
        return self

    def positions(self, num_tokens: int) -> int:
        """Return the number of positions in a forward pass: the class takes the place of the last code."""
        return num_tokens

    @property
    def ffn_matrices(self) -> int:
        """Return the number of matrices in a feed-forward layer: SwiGLU has a gate."""
        return 3


class MaskedConfig(Config):
    """MaskGIT on the codes, the paper's generator: a bidirectional transformer of BERT's shape (method.md 1.5)."""

    without: ClassVar = ("top_k", "top_p")

    kind: Literal["masked"] = "masked"
    width: PositiveInt = Field(768, description="model width")
    layers: PositiveInt = Field(24, description="transformer blocks")
    heads: PositiveInt = Field(16, description="attention heads")
    ffn_width: PositiveInt = Field(3072, description="hidden width of the feed-forward layer")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout of embeddings, attention and residuals in training")
    unmasked_weight: float = Field(0.1, ge=0, description="weight of unmasked codes in the training loss")

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width = {self.width} is not a multiple of heads = {self.heads}: choose a divisor")
        return self

    def positions(self, num_tokens: int) -> int:
        """Return the number of positions in a forward pass: the class and all codes."""
        return num_tokens + 1

    @property
    def ffn_matrices(self) -> int:
        """Return the number of matrices in a feed-forward layer."""
        return 2


def _kind_of(config: object) -> object:
    """Return the kind of a config, or of its JSON, which may omit it."""
    if isinstance(config, dict):
        return config.get("kind", "autoregressive")
    return getattr(config, "kind", None)


AnyGeneratorConfig = Annotated[
    Annotated[GeneratorConfig, Tag("autoregressive")] | Annotated[MaskedConfig, Tag("masked")],
    Discriminator(_kind_of),
]

# With 64 codes out of 8,192 and 1,001 classes: B 98.3, L 326.1, XL 753.7, XXL 1,385.8, 3B 3,044.2, masked 183.5 million
# parameters. B to 3B have the shapes of LlamaGen (arXiv 2406.06525, autoregressive/models/gpt.py).
GENERATORS: dict[str, GeneratorConfig] = {
    "toy": GeneratorConfig(width=128, layers=4, heads=4, ffn_width=344),
    "small": GeneratorConfig(width=256, layers=6, heads=4, ffn_width=688),
    "B": GeneratorConfig(width=768, layers=12, heads=12, ffn_width=2048),
    "L": GeneratorConfig(width=1024, layers=24, heads=16, ffn_width=2816),
    "XL": GeneratorConfig(width=1280, layers=36, heads=20, ffn_width=3584),
    "XXL": GeneratorConfig(width=1536, layers=48, heads=24, ffn_width=4096),
    "3B": GeneratorConfig(width=3200, layers=24, heads=32, ffn_width=8704),
}
MASKED_GENERATORS: dict[str, MaskedConfig] = {
    "toy": MaskedConfig(width=128, layers=4, heads=4, ffn_width=512),
    "published": MaskedConfig(),
}


class GeneratorTrainingConfig(TrainingConfig):
    """Length, batch and regularisation of generator training."""

    class_dropout: float = Field(
        0.1, ge=0, lt=1, description="share of labels replaced by the null class, for guidance"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    micro_batch: Annotated[int, RUNTIME] = Field(
        0,
        ge=0,
        description="sequences per forward pass; 0: the whole batch. Ranks share the micro-batches of a step; how many "
        "there are changes results by rounding only, as masks of dropout belong to sequences",
    )
    parallel: Annotated[Parallel, RUNTIME] = Field(
        "auto",
        description="how ranks share the weights: ddp: each has all of them; fsdp: each has a part; hsdp: each has a "
        "part of those that its node has; auto: ddp below 0.5 billion parameters, else fsdp",
    )
    any_tokenizer: Annotated[bool, RUNTIME] = Field(
        False, description="accept codes from another tokenizer than the one their manifest names"
    )

    @model_validator(mode="after")
    def _shards_scale_no_loss(self) -> Self:
        if self.precision == "fp16" and self.parallel in ("fsdp", "hsdp"):
            raise ValueError(
                f'parallel = "{self.parallel}" with precision = "fp16": each rank would scale its losses by itself; '
                'set precision to "bf16", or parallel to "ddp"'
            )
        return self


LEAST_TEMPERATURE = 1e-6


class SampleConfig(Config):
    """Settings of sampling. Guidance is uncond + scale * (cond - uncond), so scale 1 is conditional only."""

    model_config = ConfigDict(allow_inf_nan=False)

    per_class: PositiveInt = Field(50, description="samples per class")
    cfg_scale: float = Field(
        1.0, ge=0, le=1000, description="guidance scale; 1 is conditional only, 0 unconditional only"
    )
    cfg_schedule: GuidanceSchedule = Field(
        "constant", description="schedule by which guidance grows from 1, at the first code or step, to cfg_scale"
    )
    cfg_power: float = Field(1.0, gt=0, description="power of power_cosine; the higher, the later guidance grows")
    temperature: float = Field(
        1.0,
        ge=0,
        description="autoregressive: of the softmax, 0 takes the most likely code; "
        "masked: of the noise at the first step, annealed to 0",
    )
    top_k: int = Field(0, ge=0, description="keep the k most likely codes; 0 keeps all; autoregressive only")
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="nucleus sampling: keep the fewest most likely codes with this total probability; "
        "autoregressive only",
    )
    num_steps: PositiveInt = Field(8, description="steps in which a masked generator fills in the codes; masked only")
    annealing: tuple[float, float] | None = Field(
        None, description="numbers a and b: the logits at step s of S are divided by a + b * (1 - s / S); masked only"
    )
    micro_batch: NonNegativeInt = Field(
        0,
        description="samples drawn, and decoded, at once; fixed, since products of other shapes round differently; "
        "0: 64 on CPUs, 256 on CUDA",
    )
    samples_per_shard: PositiveInt = Field(
        256, description="rows per shard of samples; if not a multiple of micro_batch, the last batch is padded"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="precision of weights and matrix products; auto: fp32 on CPUs, bf16 on CUDA"
    )
    compile: bool | None = Field(
        None,
        description="on CPUs: compile the step as one graph, which takes up to a minute before a worker's first sample "
        "and pays only for autoregressive bf16; on CUDA: record the step of an autoregressive generator as a CUDA "
        "graph, and compile generators of more than 20 million parameters, cached in SFTOK_HOME. "
        "Not given: on CUDA only",
    )

    @model_validator(mode="after")
    def _temperature_divides(self) -> Self:
        if 0 < self.temperature < LEAST_TEMPERATURE:
            raise ValueError(
                f"temperature = {self.temperature} is too small to divide by: give 0 for the most likely codes"
            )
        return self

    @model_validator(mode="after")
    def _annealing_is_positive(self) -> Self:
        if self.annealing is not None and (self.annealing[0] <= 0 or self.annealing[1] < 0):
            raise ValueError(f"annealing = {self.annealing} divides by 0 or less: give a > 0 and b >= 0")
        return self

    def on(self, device: str) -> Self:
        """Resolve settings that depend on the device ("cpu", "cuda", "cuda:1"): precision, compile, micro_batch."""
        is_cuda = device.startswith("cuda")
        resolved = {
            "micro_batch": self.micro_batch or (256 if is_cuda else 64),
            "precision": default_precision(device) if self.precision == "auto" else self.precision,
            "compile": is_cuda if self.compile is None else self.compile,
        }
        return self.model_copy(update=resolved)

    @property
    def arithmetic(self) -> SamplePrecision:
        """Return the precision, which must be resolved."""
        assert self.precision != "auto", "SampleConfig.on(device) resolves it"
        return self.precision

    def fit(self, generator: AnyGeneratorConfig) -> None:
        """Reject settings that a generator of this kind would ignore.

        Raises:
            ValueError: a setting of another kind differs from its default.
        """
        for name in generator.without:
            default = SampleConfig.model_fields[name].default
            if (value := getattr(self, name)) != default:
                raise ValueError(
                    f"{name} = {value} has no effect on a generator that is {generator.kind}: leave it {default}"
                )
