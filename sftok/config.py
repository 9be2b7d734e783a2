"""Configs of datasets, tokenizers and their training. Defaults are those of the paper; recipes state the rest."""

from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, NonNegativeInt, PositiveInt, model_validator

from infra.artifacts.pretrained import PretrainedConfig
from infra.compute.device import default_precision
from infra.config import RUNTIME, Config, OmittedAt, Precision
from infra.training.config import OptimizerConfig, TrainingConfig

Assignment = Literal["nearest", "sinkhorn"]
MaskSchedule = Literal["arccos", "cosine", "linear", "quadratic", "cubic", "exponential"]

# pt_inception-2015-12-05-6726825d.pth of pytorch-fid; torch-fidelity's weights-inception-2015-12-05-6726825d.pth is the
# same file. ADM's .pb and clean-fid's .pt hold the same weights in other formats.
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


class DataConfig(Config):
    """Preparation of images, from a source to image Parquet."""

    image_size: PositiveInt = Field(description="side of the square images that models process, in pixels")
    val_fraction: float = Field(
        0.1, gt=0, lt=1, description="share of images held out by a hash of their id if the source has no val split"
    )
    num_shards: PositiveInt = Field(8, description="hash buckets of the train split; fixed when the dataset is created")
    num_val_shards: PositiveInt = Field(4, description="hash buckets of the val split")
    max_pixels: PositiveInt = Field(
        89_478_485, description="images with more pixels are rejected (decompression bombs)"
    )
    labels: Literal["required", "optional", "none"] = Field(
        "required",
        description="required: images without a class are rejected, a source without classes is an error; optional: "
        "images without a class are accepted; none: classes are ignored",
    )
    class_names_file: Annotated[str, RUNTIME] = Field(
        "",
        description="text file (path or s3://) of class names, one per line in the order of their ids; empty: "
        "names come from the source",
    )
    image_column: str = Field(
        "",
        description="column of a Parquet source that holds the images, or of an index that holds the paths; "
        "empty: recognised",
    )
    label_column: str = Field("", description="column that holds the labels of such a source; empty: recognised")
    max_reject_rate: Annotated[float, RUNTIME] = Field(
        0.01,
        ge=0,
        le=1,
        description="share of entries that may be rejected before prepare fails, for sources of 1,000 entries or more",
    )
    store_size: Annotated[NonNegativeInt, OmittedAt(0)] = Field(
        0,
        description="shorter side, in pixels, to which images are resized once and stored without loss, so that no "
        "large file is decoded again; 0: files are kept unchanged. With image_size, centre crops are the same",
    )
    store_format: Annotated[Literal["webp", "ppm"], OmittedAt("webp")] = Field(
        "webp",
        description="format of resized images: webp, or ppm, twice as large and read some ten times as fast",
    )

    @model_validator(mode="after")
    def _stored_images_are_large_enough(self) -> Self:
        if 0 < self.store_size < self.image_size:
            raise ValueError(
                f"store_size = {self.store_size} is below image_size = {self.image_size}: set at least as much, or 0"
            )
        if self.store_format != "webp" and not self.store_size:
            raise ValueError(f"store_format = {self.store_format} has no effect without store_size: set store_size")
        return self


class AugmentConfig(Config):
    """Random augmentation of training images: seeded, and meant to preserve the labels of the data at hand."""

    crop: Literal["center", "random"] = Field("random", description="position of the square crop in the resized image")
    flip: bool = Field(True, description="mirror half of the images; off where mirroring changes the class")
    rotate: float = Field(0.0, ge=0, le=180, description="rotation drawn from +-rotate, in degrees")
    shift: float = Field(0.0, ge=0, lt=1, description="translation drawn from +-shift, as a fraction of the side")
    zoom: float = Field(0.0, ge=0, lt=1, description="scale drawn from 1 +- zoom")

    @property
    def is_affine(self) -> bool:
        """Whether affine resampling is needed."""
        return bool(self.rotate or self.shift or self.zoom)


class TeacherConfig(Config):
    """MaskGIT-VQGAN, the frozen teacher whose codes the decoder predicts (method.md 1.2)."""

    base_channels: PositiveInt = Field(128, description="channels of the first level")
    channel_multipliers: tuple[PositiveInt, ...] = Field((1, 1, 2, 2, 4), description="one entry per level")
    num_res_blocks: PositiveInt = Field(2, description="residual blocks per level")
    latent_channels: PositiveInt = Field(256, description="channels of a code vector")
    codebook_size: PositiveInt = Field(1024, description="number of proxy codes")
    norm_groups: PositiveInt = Field(32, description="groups of the group norms; divides base_channels")

    @property
    def downsample_factor(self) -> int:
        """Side of the square of one proxy code, in pixels."""
        return 1 << (len(self.channel_multipliers) - 1)

    @model_validator(mode="after")
    def _divides_into_groups(self) -> Self:
        if self.base_channels % self.norm_groups:
            raise ValueError(
                f"base_channels = {self.base_channels} does not divide by norm_groups = {self.norm_groups}"
            )
        return self


class TransformerConfig(Config):
    """Width and depth of the encoder's or the decoder's transformer."""

    width: PositiveInt
    layers: PositiveInt
    heads: PositiveInt
    init_std: float = Field(
        0.02, gt=0, description="standard deviation of initial weights; narrow toy models learn faster with more"
    )

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width = {self.width} does not divide by heads = {self.heads}")
        return self


TOY = TransformerConfig(width=64, layers=2, heads=4, init_std=0.08)
SMALL = TransformerConfig(width=512, layers=8, heads=8)
BASE = TransformerConfig(width=768, layers=12, heads=12)
LARGE = TransformerConfig(width=1024, layers=24, heads=16)


class TokenizerConfig(Config):
    """SFTok: encoder, quantizer and multi-step decoder."""

    patch_size: PositiveInt = Field(16, description="side of the encoder's patches, in pixels")
    num_latent_tokens: PositiveInt = Field(64, description="one-dimensional tokens per image")
    codebook_size: int = Field(8192, ge=2, description="number of codes of latent tokens")
    code_dim: PositiveInt = Field(32, description="channels of a code vector")
    encoder: TransformerConfig = BASE
    decoder: TransformerConfig = BASE
    legacy_layout: bool = Field(
        False, description="read the encoder's output in the published code's layout; true for published weights only"
    )


# SFTok-B and SFTok-L are published; for S only the size of the transformer is.
TOKENIZERS = {
    "toy": TokenizerConfig(
        patch_size=8, num_latent_tokens=16, codebook_size=256, code_dim=16, encoder=TOY, decoder=TOY
    ),
    "S": TokenizerConfig(encoder=SMALL, decoder=SMALL),
    "B": TokenizerConfig(encoder=BASE, decoder=BASE),
    "L": TokenizerConfig(encoder=BASE, decoder=LARGE),
}


DECODING_NOISE = (
    "splitmix64/1"  # the generator of `sftok.model.noise`: part of the identity of what was decoded with noise
)


class DecodingConfig(Config):
    """Iterative decoding of latent tokens into proxy codes."""

    num_steps: PositiveInt = Field(8, description="decoder passes per image")
    temperature: float = Field(
        0.0, ge=0, description="scale of the Gumbel noise at the first step, falling to 0; 0 is deterministic"
    )
    precision: Annotated[Literal["auto", "fp32", "bf16"], OmittedAt("fp32")] = Field(
        "auto",
        description="of products in the decoder and the pixel decoder; auto: fp32 on CPUs, bf16 on CUDA",
    )

    def identity(self) -> dict[str, JsonValue]:
        """Return the fields that decide the images, and with noise the generator of its numbers."""
        return {**super().identity(), **({"noise": DECODING_NOISE} if self.temperature else {})}

    @property
    def arithmetic(self) -> Literal["fp32", "bf16"]:
        """The precision, resolved by `on`."""
        assert self.precision != "auto", "call DecodingConfig.on(device) first"
        return self.precision

    def on(self, device: str) -> Self:
        """Resolve the precision for a device."""
        return self.model_copy(update={"precision": default_precision(device)}) if self.precision == "auto" else self


class AdversarialConfig(Config):
    """A discriminator beside the reconstruction losses: hinge loss, LeCAM, a start of its own (method.md 1.3)."""

    weight: float = Field(
        ge=0, description="weight of the adversarial loss (published: 0.5); 0 trains without a discriminator"
    )
    kind: Literal["patch", "dino"] = Field(
        "dino", description="patch: a PatchGAN trained from scratch; dino: heads on a frozen DINO ViT-S/16"
    )
    dino: PretrainedConfig = Field(PretrainedConfig(), description="weights of the frozen DINO ViT-S/16")
    start_step: int = Field(20_000, ge=0, description="first step with a discriminator")
    lecam_weight: float = Field(0.001, ge=0)
    lecam_decay: float = Field(
        0.999, ge=0, lt=1, description="decay of LeCAM's averages of the discriminator's outputs"
    )
    augment: bool = Field(
        True, description="DiffAug: the discriminator sees shifted, recoloured and cut-out images only"
    )
    channels: PositiveInt = Field(64, description="channels of the patch discriminator's first layer")
    layers: PositiveInt = Field(3, description="layers of the patch discriminator that halve the side")
    optimizer: OptimizerConfig = OptimizerConfig(betas=(0.9, 0.999), warmup_steps=5_000)


NO_ADVERSARY = AdversarialConfig(weight=0)


VIRTUAL_BATCH = 8  # largest group of images in the local batch norm of the DINO discriminator


class PixelStageConfig(Config):
    """A stage that is trained on pixels, with its reconstruction, perceptual and adversarial losses."""

    training: TrainingConfig
    reconstruction_weight: float = Field(1.0, gt=0, description="weight of the mean squared error")
    perceptual_weight: float = Field(
        ge=0, description="weight of LPIPS (VGG16); 0: without LPIPS, such as for lack of its weights"
    )
    lpips: PretrainedConfig = Field(PretrainedConfig(), description="weights of LPIPS's VGG16")
    adversarial: AdversarialConfig

    @model_validator(mode="after")
    def _adversary_fits(self) -> Self:
        start, steps = self.adversarial.start_step, self.training.steps
        if self.adversarial.weight and start >= steps:
            raise ValueError(
                f"adversarial.start_step = {start} is not below training.steps = {steps}: the discriminator would "
                "never begin; lower it, or set adversarial.weight = 0"
            )
        batch = self.training.micro_batch or self.training.batch_size
        groups = -(-batch // VIRTUAL_BATCH)
        if self.adversarial.weight and self.adversarial.kind == "dino" and batch % groups:
            raise ValueError(
                f"training.micro_batch = {batch}: the DINO discriminator's local batch norm cannot divide it into "
                f"{groups} equal groups of at most {VIRTUAL_BATCH}; choose a multiple of {VIRTUAL_BATCH}, or at most it"
            )
        return self


class TeacherStageConfig(PixelStageConfig):
    """The teacher: imported, or trained on the data if no weights are given."""

    origin: Literal["trained", "imported"] = Field(
        "trained", description="imported: from the weights that `pretrained` names"
    )
    pretrained: PretrainedConfig = Field(PretrainedConfig(), description="published weights of a MaskGIT-VQGAN")
    model: TeacherConfig
    commitment_weight: float = Field(0.25, ge=0)
    restart_every: int = Field(
        0,
        ge=0,
        description="steps between replacements of unused codes by latents, in the first half of training; 0: never",
    )


class AlignmentStageConfig(Config):
    """Warm-up (everything masked) or distribution alignment (SFVR): cross-entropy on the teacher's codes."""

    training: TrainingConfig
    teacher_precision: Annotated[Precision, OmittedAt("fp32")] = Field(
        "fp32",
        description="autocast type of the frozen teacher's pass (published: fp32). Half precision is faster on CUDA "
        "and changes some codes; if it changes more than 10 % of them, training is refused",
    )
    from_scratch: bool = Field(
        False, description="start from random weights, without a warm-up stage: the ablation without warm-up"
    )
    replacement: Literal["none", "self_forcing", "ground_truth"] = Field(
        description="contents of the positions that are not masked: none (all are masked: warm-up), "
        "self_forcing (the model's own prediction: SFVR) or ground_truth (the teacher's codes: vanilla)"
    )
    guide_steps: PositiveInt = Field(
        1, description="decoding steps of the prediction that self-forcing fills in; 1 in the paper"
    )
    replace_prob: float = Field(1.0, ge=0, le=1, description="share of teacher codes that self-forcing replaces")
    mask_schedule: MaskSchedule = Field("arccos", description="distribution of the mask ratio")
    mask_power: float = Field(1.0, gt=0, description="exponent of the mask schedule")
    unmasked_weight: float = Field(0.1, ge=0, description="weight of positions that are not masked in the loss")
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    quantizer_weight: float = Field(1.0, ge=0)
    assignment: Assignment = Field("sinkhorn", description="assignment of codes in training")


class FineTuneStageConfig(PixelStageConfig):
    """Fine-tuning on pixels: encoder and quantizer frozen, decoder and pixel decoder trained."""

    guide_steps: PositiveInt = Field(1, description="decoding steps of the prediction that is filled in")
    mask_schedule: MaskSchedule = Field("arccos", description="distribution of the mask ratio")
    mask_power: float = Field(1.0, gt=0, description="exponent of the mask schedule")
    assignment: Assignment = Field("sinkhorn", description="assignment of codes in training")
