"""Data of a report, frozen: the scores of an evaluation, and every picture with its texts."""

from collections.abc import Iterator
from typing import Literal, Self

from pydantic import ConfigDict, Field, FiniteFloat, JsonValue, model_validator

from flows.results.comparison import Comparison, GateResult
from infra.config import Config
from sftok.evaluation.results import Histogram, Score


class StepScores(Config):
    """Scores of reconstructions in one number of decoding steps."""

    num_steps: int
    measures: tuple[Score, ...]


class ConfusionMatrix(Config):
    """Counts: row = intended class, column = predicted class."""

    counts: tuple[tuple[int, ...], ...]


class Picture(Config):
    """An image shown in the report."""

    file: str = Field(description="key of its PNG")
    alt: str = Field(description="alternative text")
    caption: str = ""


class PictureRow(Config):
    """One row of a grid of pictures."""

    title: str
    pictures: tuple[Picture, ...]


class Gallery(Config):
    """Pictures chosen by a stated rule, never by looks."""

    rule: str
    columns: tuple[str, ...] = Field(default=(), description="headings, if columns differ")
    rows: tuple[PictureRow, ...]

    def pictures(self) -> Iterator[Picture]:
        """Yield all pictures, row by row."""
        return (picture for row in self.rows for picture in row.pictures)


class FinalAgreement(Config):
    """Agreement of each decoding step's prediction with the final one (the paper's figure 4a)."""

    num_steps: int
    num_images: int
    kl: tuple[FiniteFloat, ...] = Field(description="nats per position: of the truth, then of steps 1 to num_steps - 1")
    top1: tuple[FiniteFloat, ...] = Field(
        description="share of positions with the same most likely code, in that order"
    )


class ReconstructionReport(Config):
    """Evaluation of reconstructions."""

    by_steps: tuple[StepScores, ...] = Field(min_length=1, description="in the order of the step counts asked for")
    measures: tuple[Score, ...]
    gallery: Gallery
    extremes: Gallery | None = Field(default=None, description="the worst, median and best by PSNR")
    agreement: FinalAgreement | None = None
    usage: Histogram | None = Field(default=None, description="code frequencies, most frequent first")


class GenerationReport(Config):
    """Evaluation of generated images."""

    measures: tuple[Score, ...]
    gallery: Gallery
    neighbours: Gallery = Field(description="samples beside their nearest training images")
    distances: Histogram = Field(description="distances to the nearest training image")
    confusion: ConfusionMatrix | None = None
    real_confusion: ConfusionMatrix | None = Field(default=None, description="of real held-out images")


class EvaluationReport(Config):
    """Output of the evaluate stage."""

    schema_version: Literal[1] = 1
    class_names: tuple[str, ...]
    image_size: int
    reconstruction: ReconstructionReport
    generation: GenerationReport

    def scores(self) -> tuple[Score, ...]:
        """Return every score, in reading order."""
        stepped = (m for step in self.reconstruction.by_steps for m in step.measures)
        return (*stepped, *self.reconstruction.measures, *self.generation.measures)

    def metrics(self) -> dict[str, float]:
        """Return values by metric name, for the manifest; per number of decoding steps: name@steps."""
        return {score.name: score.value for score in self.scores()}

    def find(self, name: str) -> Score | None:
        """Return the score of that name, if there is one."""
        return next((score for score in self.scores() if score.name == name), None)

    def pictures(self) -> Iterator[Picture]:
        """Every picture that the report shows."""
        galleries = (self.reconstruction.gallery, self.generation.gallery, self.generation.neighbours)
        for gallery in (*galleries, self.reconstruction.extremes):
            if gallery is not None:
                yield from gallery.pictures()

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        names = [score.name for score in self.scores()]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"scores named twice: {', '.join(twice)}")
        return self


class SweepPoint(Config):
    """Class accuracy of one generator's samples at one setting."""

    generator: str = Field(description="autoregressive or masked")
    cfg_scale: float = Field(description="guidance scale; 1 is conditional only")
    temperature: float = Field(description="autoregressive: of the softmax; masked: of the noise at the first step")
    samples: int = Field(gt=0, description="as many of each class")
    class_accuracy: FiniteFloat = Field(ge=0, le=1, description="share classified as the intended class")


class SweepRow(SweepPoint):
    """A point of the sweep with its cost."""

    seconds_per_image: FiniteFloat | None = Field(
        default=None, description="time of sampling the codes, on the machine that did it; without decoding"
    )


class LossCurve(Config):
    """Loss of a training by step, thinned out for a chart."""

    stage: str
    steps: tuple[int, ...]
    losses: tuple[FiniteFloat, ...]


class GeneratorFit(Config):
    """Held-out NLL per token, of the generator and of the class-and-position unigram baseline, in nats."""

    generator: str = Field(description="autoregressive: given the preceding codes; masked: given the visible ones")
    nll: FiniteFloat
    top1: FiniteFloat = Field(ge=0, le=1, description="share of codes that the generator ranks first")
    positions: tuple[int, ...]
    by_position: tuple[FiniteFloat, ...]
    frequency_nll: FiniteFloat = Field(
        description="of the unigram baseline: frequencies of training codes by class and position"
    )
    frequency_by_position: tuple[FiniteFloat, ...]


class Rejects(Config):
    """Rejected entries of the source, by reason."""

    reason: str = Field(description="without what differs between files")
    count: int
    example: str = Field(description="path of one of them")


class StageRow(Config):
    """A stage of the run."""

    name: str
    state: str = Field(description="Completed, Cached ...")
    seconds: float = Field(ge=0, description="duration of the work, when it was done")
    digest: str
    inputs: tuple[str, ...] = Field(default=(), description="digests of the artifacts it was made from")
    rate: str = Field(default="", description="throughput, in words")
    made_on: str = Field(default="", description="devices and arithmetic that computed it")
    files: tuple[str, ...] = Field(default=(), description="name, size and SHA-256 of its first files")


class Evidence(Config):
    """A figure that a finding rests on."""

    label: str
    value: FiniteFloat
    unit: Literal["", "dB", "nats", "%", "codes"] = Field("", description='"%": the value is a share in [0, 1]')

    def __str__(self) -> str:
        return f"{self.label} {self.text}"

    @property
    def text(self) -> str:
        """The value with its unit."""
        if self.unit == "%":
            return f"{100 * self.value:.3g} %"
        return f"{self.value if abs(self.value) >= 0.001 else 0:.4g} {self.unit}".rstrip()


class Finding(Config):
    """What a rule of `flows.results.health.rules` found in the figures of a run."""

    rule: str
    severity: Literal["serious", "minor"]
    stage: str = Field("", description="the training that it is about; empty: the run")
    sentence: str
    evidence: tuple[Evidence, ...]
    remedies: tuple[str, ...] = Field(description="what to try, the likeliest first; Markdown")

    @property
    def facts(self) -> str:
        """The evidence in one line."""
        return ", ".join(map(str, self.evidence))

    def __str__(self) -> str:
        return f"{self.sentence} Try: {self.remedies[0]}"


class ReportData(Config):
    """Everything that the pages of a run show."""

    model_config = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")

    run_id: str
    recipe: str
    description: str = ""
    created_at: str = Field(description="ISO 8601, UTC")
    source: str = Field(default="", description="source of the images")
    command: str = ""
    counts: dict[str, int] = Field(default_factory=dict, description="found, accepted, rejected, train, val, classes")
    stages: tuple[StageRow, ...]
    evaluation: EvaluationReport
    sweep: tuple[SweepRow, ...] = Field(default=(), description="both generators, at every setting")
    losses: tuple[LossCurve, ...] = Field(default=(), description="one per training")
    fit: GeneratorFit | None = Field(default=None, description="of the generator to held-out codes")
    rejects: tuple[Rejects, ...] = Field(default=(), description="most frequent first")
    comparison: Comparison | None = Field(default=None, description="with an earlier run, if there is one")
    gate: GateResult | None = Field(default=None, description="verdict of the regression gate, if it was run")
    images: dict[str, bytes] = Field(
        default_factory=dict, description="PNG of each picture; left out of the JSON form", repr=False
    )
    findings: tuple[Finding, ...] = Field(default=(), description="what to look at first")
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
