"""What the report knows, as frozen data: every figure with its whole protocol, every picture with its words."""

from collections.abc import Iterator
from typing import Literal, Self

from pydantic import ConfigDict, Field, FiniteFloat, JsonValue, model_validator

from flows.results.comparison import Comparison, GateResult
from infra.config import Config


class Protocol(Config):
    """How a figure came about; a figure without it cannot be compared with anything."""

    num_images: int = Field(description="N: images (or rows of codes) measured")
    reference: str = Field(default="", description="what they were compared with")
    num_reference: int | None = Field(default=None, description="images (or rows of codes) of the reference")
    extractor: str = Field(default="", description="feature extractor or classifier")
    extractor_sha256: str = Field(default="", description="hash of the extractor's weights, where it has any")
    resize: str = Field(default="", description="how images of the source came to their size")
    rounding: str = Field(default="", description="how floats became the pixels that were measured")
    dtype: str = Field(default="", description="number type of the arithmetic")
    num_steps: int | None = Field(default=None, description="decoding steps of the tokenizer")
    temperature: float | None = Field(
        default=None, description="decoding temperature of the tokenizer; 0 is deterministic"
    )
    sample_temperature: float | None = Field(default=None, description="temperature of the generator")
    cfg_scale: float | None = Field(default=None, description="guidance of the generator; 1 is conditional only")
    seeds: dict[str, int] = Field(default_factory=dict, description="seed of each source of chance")
    definition: str = Field(default="", description="formula or convention, in words")


class Measure(Config):
    """One figure: what it is, its value, which way is better, and the protocol behind it."""

    name: str = Field(description="flat name, as it stands in manifests: reconstruction.psnr")
    label: str
    value: FiniteFloat
    unit: Literal["", "dB", "bits", "%", "codes"] = Field(default="", description='"%": the value is a share in [0, 1]')
    better: Literal["higher", "lower", ""] = Field(default="", description="empty where neither is better as such")
    interval: tuple[FiniteFloat, FiniteFloat] | None = Field(
        default=None, description="interval, by the protocol's definition"
    )
    protocol: Protocol


class StepMeasures(Config):
    """Reconstruction after so many decoding steps."""

    num_steps: int
    measures: tuple[Measure, ...]


class Histogram(Config):
    """Shares of several series over the same bins, for a drawing."""

    title: str
    axis: str
    edges: tuple[FiniteFloat, ...] = Field(description="bin edges; one more than bins")
    series: dict[str, tuple[FiniteFloat, ...]] = Field(description="share a bin of each series")


class ConfusionMatrix(Config):
    """Counts: row = intended class, column = class read."""

    counts: tuple[tuple[int, ...], ...]


class Picture(Config):
    """An image shown in the report."""

    file: str = Field(description="key of its PNG")
    alt: str = Field(description="text for those who cannot see it")
    caption: str = ""


class PictureRow(Config):
    """One row of a grid of pictures."""

    title: str
    pictures: tuple[Picture, ...]


class Gallery(Config):
    """Pictures chosen by rule, never by looks; the rule is stated."""

    rule: str
    columns: tuple[str, ...] = Field(default=(), description="headings, where columns differ")
    rows: tuple[PictureRow, ...]

    def pictures(self) -> Iterator[Picture]:
        """All pictures, row by row."""
        return (picture for row in self.rows for picture in row.pictures)


class FinalAgreement(Config):
    """How near what is predicted on the way is to the final prediction (the paper's figure 4a)."""

    num_steps: int
    num_images: int
    kl: tuple[FiniteFloat, ...] = Field(description="nats a position: of the truth, then of steps 1 to num_steps - 1")
    top1: tuple[FiniteFloat, ...] = Field(description="share of positions with the same likeliest code, in that order")


class ReconstructionReport(Config):
    """Images through the tokenizer and back."""

    by_steps: tuple[StepMeasures, ...] = Field(min_length=1, description="in the order of the step counts asked for")
    measures: tuple[Measure, ...]
    gallery: Gallery
    extremes: Gallery | None = Field(default=None, description="the worst, the middle and the best by PSNR")
    agreement: FinalAgreement | None = None
    usage: Histogram | None = Field(default=None, description="how often codes occur, the commonest first")


class GenerationReport(Config):
    """Images from the generator."""

    measures: tuple[Measure, ...]
    gallery: Gallery
    neighbours: Gallery = Field(description="samples beside their nearest training images")
    distances: Histogram = Field(description="distances to the nearest training image")
    confusion: ConfusionMatrix | None = None


class EvaluationReport(Config):
    """Everything that the evaluate stage found."""

    schema_version: Literal[1] = 1
    class_names: tuple[str, ...]
    image_size: int
    reconstruction: ReconstructionReport
    generation: GenerationReport

    def measures(self) -> tuple[Measure, ...]:
        """Every figure, in reading order."""
        stepped = (m for step in self.reconstruction.by_steps for m in step.measures)
        return (*stepped, *self.reconstruction.measures, *self.generation.measures)

    def metrics(self) -> dict[str, float]:
        """Flat names to values, for the manifest; a figure a step count is called name@steps."""
        return {measure.name: measure.value for measure in self.measures()}

    def find(self, name: str) -> Measure | None:
        """The figure of that name, if it was measured."""
        return next((measure for measure in self.measures() if measure.name == name), None)

    def pictures(self) -> Iterator[Picture]:
        """Every picture that the report shows."""
        galleries = (self.reconstruction.gallery, self.generation.gallery, self.generation.neighbours)
        for gallery in (*galleries, self.reconstruction.extremes):
            if gallery is not None:
                yield from gallery.pictures()

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        names = [measure.name for measure in self.measures()]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"measures named twice: {', '.join(twice)}")
        return self


class SweepPoint(Config):
    """How often samples of one generator show their class at one setting."""

    generator: str = Field(description="autoregressive or masked")
    cfg_scale: float = Field(description="guidance; 1 is conditional only")
    temperature: float = Field(description="autoregressive: of the softmax; masked: of the noise at the first step")
    samples: int = Field(gt=0, description="as many of every class")
    class_accuracy: FiniteFloat = Field(ge=0, le=1, description="share read as the class that is meant")


class SweepRow(SweepPoint):
    """The same with what it took."""

    seconds_per_image: FiniteFloat | None = Field(
        default=None, description="drawing the codes, on the machine that did it; without decoding"
    )


class LossCurve(Config):
    """How a training went: its loss by steps, thinned out for a drawing."""

    stage: str
    steps: tuple[int, ...]
    losses: tuple[FiniteFloat, ...]


class GeneratorFit(Config):
    """Nats a held-out code, to the generator and to a model of class and position alone."""

    generator: str = Field(
        description="autoregressive: given the codes before; masked: given those that are not hidden"
    )
    nll: FiniteFloat
    top1: FiniteFloat = Field(ge=0, le=1, description="share of codes that the generator holds likeliest")
    positions: tuple[int, ...]
    by_position: tuple[FiniteFloat, ...]
    frequency_nll: FiniteFloat = Field(description="under the frequencies of training codes of its class and position")
    frequency_by_position: tuple[FiniteFloat, ...]


class Rejects(Config):
    """Entries of the source that are no images, by reason."""

    reason: str = Field(description="without what differs from file to file")
    count: int
    example: str = Field(description="path of one of them")


class StageRow(Config):
    """One stage of the run."""

    name: str
    state: str = Field(description="Completed, Cached ...")
    seconds: float = Field(ge=0, description="how long the work took, when it was done")
    digest: str
    uri: str = ""
    inputs: tuple[str, ...] = Field(default=(), description="digests of the artifacts it was made from")
    rate: str = Field(default="", description="what it did a second, in words")
    made_on: str = Field(default="", description="devices and arithmetic that computed it")
    files: tuple[str, ...] = Field(default=(), description="name, size and SHA-256 of its files, the first of them")


class ReportData(Config):
    """One run, ready to be shown."""

    model_config = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")

    run_id: str
    recipe: str
    description: str = ""
    created_at: str = Field(description="ISO 8601, UTC")
    source: str = Field(default="", description="where the images came from")
    command: str = ""
    counts: dict[str, int] = Field(default_factory=dict, description="found, accepted, rejected, train, val, classes")
    stages: tuple[StageRow, ...]
    evaluation: EvaluationReport
    sweep: tuple[SweepRow, ...] = Field(default=(), description="generators side by side, at every setting")
    losses: tuple[LossCurve, ...] = Field(default=(), description="of each training")
    fit: GeneratorFit | None = Field(default=None, description="of the generator to held-out codes")
    rejects: tuple[Rejects, ...] = Field(default=(), description="commonest first")
    comparison: Comparison | None = Field(default=None, description="with an earlier run, where there is one")
    gate: GateResult | None = Field(default=None, description="what the regression gate said, where it was asked")
    images: dict[str, bytes] = Field(
        default_factory=dict, description="PNG of each picture; left out of the JSON form", repr=False
    )
    config: dict[str, JsonValue] = Field(default_factory=dict, description="the whole configuration")
    versions: dict[str, str] = Field(default_factory=dict, description="Python, torch, this project ...")
    hardware: dict[str, str] = Field(default_factory=dict, description="processor, cores, memory, devices")
    git_revision: str | None = None

    @model_validator(mode="after")
    def _pictures_are_there(self) -> Self:
        missing = sorted({picture.file for picture in self.evaluation.pictures()} - self.images.keys())
        if missing:
            raise ValueError(f"images lacks {len(missing)} pictures of the evaluation, the first is {missing[0]}")
        return self
