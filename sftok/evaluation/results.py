"""Results of evaluators as data, frozen: every score with its whole protocol."""

from typing import Literal

from pydantic import Field, FiniteFloat

from infra.config import Config


class Protocol(Config):
    """Protocol of a score: everything that must be equal for two scores to be comparable."""

    num_images: int = Field(description="N: images (or rows of codes) measured")
    reference: str = Field(default="", description="what they were compared with")
    num_reference: int | None = Field(default=None, description="images (or rows of codes) of the reference")
    extractor: str = Field(default="", description="feature extractor or classifier")
    extractor_sha256: str = Field(default="", description="hash of the extractor's weights, where it has any")
    resize: str = Field(default="", description="how source images were resized")
    rounding: str = Field(default="", description="how floats were converted to the pixels measured")
    dtype: str = Field(default="", description="number format of the arithmetic")
    num_steps: int | None = Field(default=None, description="decoding steps of the tokenizer")
    temperature: float | None = Field(
        default=None, description="decoding temperature of the tokenizer; 0 is deterministic"
    )
    sample_temperature: float | None = Field(default=None, description="temperature of the generator")
    cfg_scale: float | None = Field(default=None, description="guidance scale of the generator; 1 is conditional only")
    seeds: dict[str, int] = Field(default_factory=dict, description="seed of each source of randomness")
    definition: str = Field(default="", description="formula or convention, in words")


class Score(Config):
    """A metric's value with its interval and protocol."""

    name: str = Field(description="metric name, as in manifests: reconstruction.psnr")
    label: str
    value: FiniteFloat
    unit: Literal["", "dB", "bits", "%", "codes"] = Field(default="", description='"%": the value is a share in [0, 1]')
    better: Literal["higher", "lower", ""] = Field(default="", description="empty if neither is better as such")
    interval: tuple[FiniteFloat, FiniteFloat] | None = Field(
        default=None, description="interval, as the protocol defines it"
    )
    protocol: Protocol


class Histogram(Config):
    """Shares of several series over the same bins, for a chart."""

    title: str
    axis: str
    edges: tuple[FiniteFloat, ...] = Field(description="bin edges; one more than bins")
    series: dict[str, tuple[FiniteFloat, ...]] = Field(description="share per bin of each series")
