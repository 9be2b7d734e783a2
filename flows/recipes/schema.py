"""The schema of recipes: everything that decides what a run computes, from images to report, as data."""

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import (
    Field,
    JsonValue,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from flows.option_texts import DEVICE
from flows.results.gate import GateConfig
from generator.config import AnyGeneratorConfig, GeneratorTrainingConfig, SampleConfig
from infra.artifacts.pretrained import PretrainedConfig
from infra.compute.device import DeviceChoice, NumericsConfig, default_precision
from infra.config import Config, OmittedAt
from infra.training.config import COMPILED_WIDTH, TrainingConfig
from sftok.config import (
    INCEPTION_SHA256,
    AlignmentStageConfig,
    Assignment,
    AugmentConfig,
    DataConfig,
    DecodingConfig,
    FineTuneStageConfig,
    TeacherStageConfig,
    TokenizerConfig,
)
from sftok.images.views import TEN_CROP_RESIZE, expanded, has_crops, ten_crop_side

if TYPE_CHECKING:
    from generator.code_space import CodeSpace


class EncodeConfig(Config):
    """Tokenization of the dataset."""

    variants: tuple[str, ...] = Field(
        ("center",), description="views of a training image: center, flip, affine-1, affine-2 ..., ten_crop"
    )
    val_variants: tuple[str, ...] = Field(("center",), description="views of a held-out image")
    assignment: Assignment = Field(
        "nearest", description="assignment of codes; sinkhorn balances within a micro-batch, as published"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="arithmetic of the encoder; bf16 changes some codes; auto: fp32 on CPUs, bf16 on CUDA"
    )
    micro_batch: NonNegativeInt = Field(
        0, description="images encoded at once; fixed, the last batch padded; 0: 64 on CPUs, 256 on CUDA"
    )
    compile: Annotated[bool | None, OmittedAt(None, False)] = Field(
        None,
        description="compile the encoder's blocks; not given: on CUDA, unless the encoder is so small that compiling "
        "would take longer than encoding",
    )
    decoder: Annotated[Literal["pil", "torchcodec"], OmittedAt("pil")] = Field(
        "pil",
        description="library that decodes and resizes images: pil, or torchcodec (to be installed) with torch, on the "
        "encoder's GPU: some pixels differ by one level of 255",
    )
    ten_crop_resize: float = Field(
        TEN_CROP_RESIZE,
        gt=1,
        le=2,
        description="side of the square that the views crop-1 to crop-10 are cut from, over data.image_size",
    )

    @field_validator("variants", "val_variants")
    @classmethod
    def _ten_crop_stands_for_ten(cls, views: tuple[str, ...]) -> tuple[str, ...]:
        return expanded(views)

    def on(self, device: str, *, width: int) -> Self:
        """Resolve what depends on the device and the width of the encoder: precision, micro-batch, compilation."""
        is_cuda = device.startswith("cuda")
        settled = {
            "micro_batch": self.micro_batch or (256 if is_cuda else 64),
            "precision": default_precision(device) if self.precision == "auto" else self.precision,
            "compile": is_cuda and width >= COMPILED_WIDTH if self.compile is None else self.compile,
        }
        return self.model_copy(update=settled)

    @property
    def has_crops(self) -> bool:
        """Return whether any view is one of the ten crops."""
        return has_crops((*self.variants, *self.val_variants))

    def identity(self) -> dict[str, JsonValue]:
        """Return what decides the codes; the size of ten crops only where a view is one of them."""
        identity = super().identity()
        if not self.has_crops:
            del identity["ten_crop_resize"]
        return identity

    @model_validator(mode="after")
    def _resize_is_used(self) -> Self:
        if self.ten_crop_resize != TEN_CROP_RESIZE and not self.has_crops:
            raise ValueError(f"ten_crop_resize = {self.ten_crop_resize:g} changes nothing: name ten_crop as a view")
        return self

    @model_validator(mode="after")
    def _each_view_once(self) -> Self:
        for name, views in (("variants", self.variants), ("val_variants", self.val_variants)):
            if not views:
                raise ValueError(f"{name} = () is empty: name one view at least, such as center")
            if len(set(views)) != len(views):
                raise ValueError(f"{name} = {', '.join(views)} names a view twice: name each once")
        return self


class SweepConfig(Config):
    """Class accuracy of samples against guidance and temperature, of the run's generator and of a second one."""

    cfg_scales: tuple[NonNegativeFloat, ...] = Field((), description="guidance scales to try; empty: no sweep")
    temperatures: tuple[PositiveFloat, ...] = Field((1.0, 1.5), description="of an autoregressive generator")
    masked_temperatures: tuple[PositiveFloat, ...] = Field((1.0, 8.0), description="of a masked generator")
    per_class: PositiveInt = Field(10, description="samples per class at every setting")
    generator: AnyGeneratorConfig | None = Field(
        None, description="a second generator of the same codes, for a stage of its own"
    )
    train_generator: GeneratorTrainingConfig | None = Field(None, description="training of the second one")

    @model_validator(mode="after")
    def _second_one_is_whole(self) -> Self:
        if (self.generator is None) != (self.train_generator is None):
            raise ValueError("generator and train_generator belong together: give both, or neither")
        if self.cfg_scales and not (self.temperatures and self.masked_temperatures):
            raise ValueError("temperatures and masked_temperatures need at least one value each, such as 1.0")
        return self

    def temperatures_of(self, kind: str) -> tuple[float, ...]:
        """Return the temperatures to try with a generator of this kind."""
        return self.masked_temperatures if kind == "masked" else self.temperatures


class ScoresConfig(Config):
    """FID and related scores, which need Inception's weights."""

    protocol: Literal["none", "torch_fidelity", "clean", "adm"] = Field(
        "none", description="protocol of the scores (sftok.metrics.protocols); none: random features only"
    )
    inception: PretrainedConfig = Field(
        PretrainedConfig(sha256=INCEPTION_SHA256),
        description="the network's weights: `sftok weights fetch inception-2015` downloads the published ones",
    )
    num_samples: int | None = Field(
        None, ge=20, description="samples to score; an N other than the protocol's is appended to its name"
    )
    reference: str = Field("", description="an .npz file of ADM or clean-fid; empty: the real training images")
    reference_features: PositiveInt = Field(
        10_000, description="training images, drawn by the seed, whose features KID, precision and recall use"
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of the features")

    def identity(self) -> dict[str, JsonValue]:
        """Return what decides the scores: nothing else where none are taken."""
        return {"protocol": "none"} if self.protocol == "none" else super().identity()


class EvaluateConfig(Config):
    """Evaluation of reconstructions and samples."""

    steps: tuple[PositiveInt, ...] = Field((1, 2, 4, 8), description="numbers of decoding steps that are compared")
    class_reader: bool = Field(
        False,
        description="train a classifier (scikit-learn) on the real training images, and score class agreement with it",
    )
    classifier_images: PositiveInt = Field(
        20_000, description="training images for the classifier: all, or this many chosen by hash"
    )
    nearest_images: PositiveInt = Field(
        1_000, description="samples, and held-out images, evenly spread, whose nearest training image is searched for"
    )
    feature_seed: int = Field(0, description="seed of the random feature extractor")
    sweep: SweepConfig = SweepConfig()
    scores: ScoresConfig = ScoresConfig()
    lpips: PretrainedConfig = Field(
        PretrainedConfig(), description="VGG16's weights, for LPIPS of reconstructions; not given: no LPIPS"
    )

    @model_validator(mode="after")
    def _sweep_has_a_reader(self) -> Self:
        if self.sweep.cfg_scales and not self.class_reader:
            raise ValueError("sweep.cfg_scales needs the class reader: set class_reader = true, or sweep.cfg_scales=[]")
        return self


class ComputeConfig(NumericsConfig):
    """Device and arithmetic of a run."""

    device: DeviceChoice = Field(
        "auto",
        description=DEVICE,
    )

    @property
    def numerics(self) -> NumericsConfig:
        """Return the arithmetic without the device."""
        return NumericsConfig(**self.model_dump(include=set(NumericsConfig.model_fields)))


class Recipe(Config):
    """Everything that decides what a run computes, from images to report."""

    name: str
    description: str = ""
    seed: int = Field(0, ge=0)
    threads: PositiveInt = Field(
        2, description="threads per training process; sums round differently with another number"
    )
    compute: ComputeConfig = ComputeConfig()
    source: str = Field("", description="images to use if --data is not given; empty: --data is required")
    data: DataConfig
    augment: AugmentConfig = AugmentConfig()
    teacher: TeacherStageConfig
    tokenizer: TokenizerConfig
    warm_up: AlignmentStageConfig
    align: AlignmentStageConfig
    fine_tune: FineTuneStageConfig
    decoding: DecodingConfig = DecodingConfig()
    encode: EncodeConfig = EncodeConfig()
    generator: AnyGeneratorConfig
    train_generator: GeneratorTrainingConfig
    sample: SampleConfig = SampleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    gate: GateConfig = GateConfig()

    @property
    def second(self) -> Self | None:
        """The recipe with the sweep's second generator in place of the first; None if there is no such sweep."""
        sweep = self.evaluate.sweep
        if not sweep.cfg_scales or sweep.generator is None:
            return None
        return self.model_copy(update={"generator": sweep.generator, "train_generator": sweep.train_generator})

    def code_space(self, num_classes: int) -> "CodeSpace":
        """Return what a generator is built for: the tokenizer's codes, and so many classes."""
        from generator.code_space import CodeSpace

        return CodeSpace(self.tokenizer.codebook_size, self.tokenizer.num_latent_tokens, num_classes)

    def trainings(self) -> dict[str, TrainingConfig]:
        """Return the training of each stage that trains, by stage."""
        found = {} if self.teacher.origin == "imported" else {"teacher": self.teacher.training}
        found |= {name: getattr(self, name).training for name in ("warm_up", "align", "fine_tune")}
        found["train_generator"] = self.train_generator
        return found | ({} if self.second is None else {"train_second_generator": self.second.train_generator})

    def on(self, device: str) -> Self:
        """Resolve the device, and the settings that depend on it."""
        teacher, generator, sweep = self.teacher, self.generator, self.evaluate.sweep
        encoder = self.tokenizer.encoder.width
        settled: dict[str, object] = {}
        for name in ("warm_up", "align", "fine_tune"):
            stage: AlignmentStageConfig | FineTuneStageConfig = getattr(self, name)
            settled[name] = stage.model_copy(update={"training": stage.training.on(device, width=encoder)})
        width = teacher.model.base_channels * max(teacher.model.channel_multipliers)
        settled["teacher"] = teacher.model_copy(update={"training": teacher.training.on(device, width=width)})
        settled["train_generator"] = self.train_generator.on(device, width=generator.width)
        if sweep.generator is not None and sweep.train_generator is not None:
            training = sweep.train_generator.on(device, width=sweep.generator.width)
            changed = sweep.model_copy(update={"train_generator": training})
            settled["evaluate"] = self.evaluate.model_copy(update={"sweep": changed})
        settled |= {
            "compute": self.compute.model_copy(update={"device": device}),
            "encode": self.encode.on(device, width=self.tokenizer.encoder.width),
            "decoding": self.decoding.on(device),
            "sample": self.sample.on(device),
        }
        return self.model_copy(update=settled)

    @model_validator(mode="after")
    def _samples_fit_the_generator(self) -> Self:
        self.sample.fit(self.generator)
        return self

    @model_validator(mode="after")
    def _image_divides(self) -> Self:
        for what, side in (
            ("tokenizer.patch_size", self.tokenizer.patch_size),
            ("the teacher's down-sampling factor", self.teacher.model.downsample_factor),
        ):
            if self.data.image_size % side:
                raise ValueError(f"data.image_size = {self.data.image_size} does not divide by {what} = {side}")
        if self.encode.has_crops:
            ten_crop_side(self.data.image_size, self.encode.ten_crop_resize)
        return self
