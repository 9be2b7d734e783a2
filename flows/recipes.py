"""Named full configurations. A recipe is a claim: its docstring states command, time and expected result."""

from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator

from generator.config import GENERATORS, AnyGeneratorConfig, GeneratorConfig, GeneratorTrainingConfig, SampleConfig
from infra.config import Config
from infra.schedule import OptimizerConfig, TrainingConfig
from sftok.config import (
    NO_ADVERSARY,
    TOKENIZERS,
    AdversarialConfig,
    AlignmentStageConfig,
    Assignment,
    AugmentConfig,
    DataConfig,
    DecodingConfig,
    FineTuneStageConfig,
    TeacherConfig,
    TeacherStageConfig,
    TokenizerConfig,
    TransformerConfig,
)


class EncodeConfig(Config):
    """Tokenization of the dataset."""

    variants: tuple[str, ...] = Field(
        ("center",), description="views of a training image: center, flip, affine-1, affine-2 ..."
    )
    val_variants: tuple[str, ...] = Field(("center",), description="views of a held-out image")
    assignment: Assignment = "nearest"
    precision: Literal["fp32", "bf16"] = Field("fp32", description="arithmetic of the encoder; bf16 changes some codes")
    micro_batch: PositiveInt = Field(64, description="images encoded at once; fixed, the last one padded")

    @model_validator(mode="after")
    def _each_view_once(self) -> Self:
        for name, views in (("variants", self.variants), ("val_variants", self.val_variants)):
            if not views:
                raise ValueError(f"{name} is empty: name one view at least, such as center")
            if len(set(views)) != len(views):
                raise ValueError(f"{name} = {', '.join(views)} names a view twice: name each once")
        return self


class EvaluateConfig(Config):
    """What is measured."""

    steps: tuple[PositiveInt, ...] = Field((1, 2, 4, 8), description="numbers of decoding steps that are compared")
    class_reader: bool = Field(
        False,
        description="train a classifier (scikit-learn) on the real training images and let it read the classes",
    )
    feature_seed: int = Field(0, description="seed of the random feature extractor")


class Recipe(Config):
    """Everything that decides what is computed, from images to report."""

    name: str
    description: str = ""
    seed: int = Field(0, ge=0)
    threads: PositiveInt = Field(
        2, description="threads of a training process; sums round differently with another number"
    )
    source: str = Field("", description="images to use where --data is not given; empty: --data is required")
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

    @model_validator(mode="after")
    def _image_divides(self) -> Self:
        for what, side in (
            ("tokenizer.patch_size", self.tokenizer.patch_size),
            ("the teacher's down-sampling factor", self.teacher.model.downsample_factor),
        ):
            if self.data.image_size % side:
                raise ValueError(f"data.image_size = {self.data.image_size} does not divide by {what} = {side}")
        return self


def _optimizer(lr: float, warmup_steps: int) -> OptimizerConfig:
    """The optimizer of small recipes: a short warm-up, a decay to a twentieth, a short average."""
    return OptimizerConfig(lr=lr, end_lr=lr / 20, warmup_steps=warmup_steps, ema_decay=0.98)


def _training(steps: int, lr: float, batch_size: int = 32) -> TrainingConfig:
    """A training stage of small recipes."""
    return TrainingConfig(
        steps=steps, batch_size=batch_size, optimizer=_optimizer(lr, min(20, steps // 5)), checkpoint_every=100
    )


def _generator_training(steps: int, lr: float, batch_size: int, *, validate_every: int) -> GeneratorTrainingConfig:
    """The same for a generator, stopped where held-out images become less likely."""
    return GeneratorTrainingConfig.model_validate(
        {**_training(steps, lr, batch_size).as_json(), "validate_every": validate_every, "keep": "best"}
    )


def _views(count: int) -> tuple[str, ...]:
    """The centre view and `count` affine ones."""
    return ("center", *(f"affine-{k}" for k in range(1, count + 1)))


def digits() -> Recipe:
    """Handwritten digits at 32x32: the whole pipeline on two cores. `sftok run digits`.

    scikit-learn's 1,797 scans; under 8 minutes on two cores. Expected: a classifier trained on the real training images
    reads at least 95 % of reconstructed held-out digits and at least 90 % of 1,000 generated ones as intended.
    """
    return Recipe(
        name="digits",
        description="scikit-learn's 1,797 handwritten digits, 32x32 RGB, 16 tokens of 256 codes",
        source="sklearn:digits",
        data=DataConfig(image_size=32, val_fraction=0.2),
        augment=AugmentConfig(crop="center", flip=False, rotate=6, shift=0.04, zoom=0.05),
        teacher=TeacherStageConfig(
            model=TeacherConfig(
                base_channels=16,
                channel_multipliers=(1, 2, 2),
                num_res_blocks=1,
                latent_channels=16,
                codebook_size=32,
                norm_groups=8,
            ),
            training=_training(250, 3e-3),
            restart_every=20,
            perceptual_weight=0,
            adversarial=NO_ADVERSARY,
        ),
        tokenizer=TOKENIZERS["toy"],
        warm_up=AlignmentStageConfig(training=_training(500, 3e-3), replacement="none"),
        align=AlignmentStageConfig(training=_training(800, 3e-3), replacement="self_forcing"),
        fine_tune=FineTuneStageConfig(
            training=_training(400, 2e-3), assignment="nearest", perceptual_weight=0, adversarial=NO_ADVERSARY
        ),
        encode=EncodeConfig(variants=_views(9)),
        generator=GENERATORS["toy"],
        train_generator=_generator_training(500, 2e-3, 128, validate_every=50),
        sample=SampleConfig(per_class=100, cfg_scale=2.0),
        evaluate=EvaluateConfig(class_reader=True),
    )


def digits_tiny() -> Recipe:
    """Every stage and component of `digits` in under 40 s, for tests; nothing is learnt in so few steps."""
    full = digits()
    narrow = TransformerConfig(width=32, layers=2, heads=2)
    few = _training(4, 1e-3, 8).model_copy(update={"checkpoint_every": 2, "log_every": 1})
    return Recipe.model_validate(
        full.model_copy(
            update={
                "name": "digits_tiny",
                "description": "every stage of digits, a few steps each; for tests",
                "teacher": full.teacher.model_copy(update={"training": few}),
                "tokenizer": full.tokenizer.model_copy(update={"encoder": narrow, "decoder": narrow}),
                "warm_up": full.warm_up.model_copy(update={"training": few}),
                "align": full.align.model_copy(update={"training": few}),
                "fine_tune": full.fine_tune.model_copy(update={"training": few}),
                "encode": EncodeConfig(variants=_views(1)),
                "generator": GeneratorConfig(width=32, layers=1, heads=2, ffn_width=64),
                "train_generator": full.train_generator.model_copy(
                    update={"steps": 4, "validate_every": 2, "checkpoint_every": 2, "log_every": 1}
                ),
                "sample": full.sample.model_copy(update={"per_class": 4, "samples_per_shard": 10}),
                "evaluate": full.evaluate.model_copy(update={"steps": (1, 2)}),
            }
        ).model_dump()
    )


def small64() -> Recipe:
    """Own images at 64x64, any number of classes, on a laptop: `sftok run small64 --data DIR`.

    A start for own data, not a claim: at its default length it takes hours on two cores, and no result is promised.
    """
    width = TransformerConfig(width=256, layers=4, heads=4, init_std=0.04)
    return Recipe(
        name="small64",
        description="own images at 64x64 RGB, 32 tokens of 1,024 codes",
        data=DataConfig(image_size=64, val_fraction=0.1),
        augment=AugmentConfig(crop="random", flip=True),
        teacher=TeacherStageConfig(
            model=TeacherConfig(
                base_channels=32,
                channel_multipliers=(1, 2, 2, 4),
                num_res_blocks=1,
                latent_channels=32,
                codebook_size=512,
                norm_groups=8,
            ),
            training=_training(4000, 1e-3),
            restart_every=50,
            perceptual_weight=0,
            adversarial=NO_ADVERSARY,
        ),
        tokenizer=TokenizerConfig(
            patch_size=8, num_latent_tokens=32, codebook_size=1024, code_dim=16, encoder=width, decoder=width
        ),
        warm_up=AlignmentStageConfig(training=_training(4000, 1e-3), replacement="none"),
        align=AlignmentStageConfig(training=_training(8000, 1e-3), replacement="self_forcing"),
        fine_tune=FineTuneStageConfig(training=_training(4000, 3e-4), perceptual_weight=0, adversarial=NO_ADVERSARY),
        encode=EncodeConfig(variants=("center", "flip")),
        generator=GENERATORS["small"],
        train_generator=_generator_training(6000, 1e-3, 64, validate_every=200),
        sample=SampleConfig(per_class=50, cfg_scale=2.0),
    )


def _imagenet_training(
    steps: int, batch_size: int, micro_batch: int, *, warmup_steps: int, beta_2: float
) -> TrainingConfig:
    """A stage as published: fp16, AdamW at 1e-4 falling to 1e-5, micro-batches of one of eight GPUs (METHOD 1.3)."""
    return TrainingConfig(
        steps=steps,
        batch_size=batch_size,
        micro_batch=micro_batch,
        optimizer=OptimizerConfig(
            lr=1e-4, end_lr=1e-5, warmup_steps=warmup_steps, betas=(0.9, beta_2), weight_decay=1e-4, ema_decay=0.999
        ),
        precision="fp16",
        checkpoint_every=25_000,
        keep_checkpoints=2,
        log_every=100,
        validate_every=50_000,
    )


def _imagenet256(name: str, size: str, description: str) -> Recipe:
    """The paper's schedule at 256x256 for a published size. Ours are the autoregressive generator and its training."""
    alignment = _imagenet_training(200_000, 256, 32, warmup_steps=10_000, beta_2=0.99)
    pixels = _imagenet_training(1_000_000, 128, 8, warmup_steps=5_000, beta_2=0.999)
    return Recipe(
        name=name,
        description=description,
        seed=42,
        data=DataConfig(image_size=256, num_shards=1024, num_val_shards=64),
        augment=AugmentConfig(crop="random", flip=True),
        teacher=TeacherStageConfig(
            origin="imported", model=TeacherConfig(), training=pixels, perceptual_weight=1, adversarial=NO_ADVERSARY
        ),
        tokenizer=TOKENIZERS[size],
        warm_up=AlignmentStageConfig(training=alignment, replacement="none"),
        align=AlignmentStageConfig(
            training=alignment.model_copy(update={"steps": 800_000}), replacement="self_forcing", replace_prob=1.0
        ),
        fine_tune=FineTuneStageConfig(
            training=pixels, perceptual_weight=1, adversarial=AdversarialConfig(weight=0.5, kind="dino")
        ),
        encode=EncodeConfig(variants=("center", "flip"), micro_batch=8),
        generator=GENERATORS["B"],
        train_generator=GeneratorTrainingConfig(
            steps=500_000,
            batch_size=1024,
            micro_batch=128,
            optimizer=OptimizerConfig(lr=2e-4, end_lr=1e-5, warmup_steps=10_000, betas=(0.9, 0.96), weight_decay=0.03),
            precision="bf16",
            checkpoint_every=25_000,
            log_every=100,
            validate_every=25_000,
        ),
        sample=SampleConfig(per_class=50, cfg_scale=2.0),
        evaluate=EvaluateConfig(steps=(1, 2, 4, 8, 16)),
    )


def imagenet256_sftok_b() -> Recipe:
    """SFTok-B at 256x256, 64 tokens of 8,192 codes: `sftok run imagenet256_sftok_b --data DIR --ranks 8`.

    The schedule of arXiv 2512.16910 as far as it is published: 200,000 steps of warming up, 800,000 of alignment and
    1,000,000 of fine-tuning on eight GPUs. Published: rFID 1.44 at 8 steps (1.67 at 1). It has not been trained here.
    Needs the weights of the teacher (`teacher.pretrained`), of LPIPS (`fine_tune.lpips`) and of DINO
    (`fine_tune.adversarial.dino`).
    """
    return _imagenet256("imagenet256_sftok_b", "B", "SFTok-B as published, 64 tokens of 8,192 codes")


def imagenet256_sftok_l() -> Recipe:
    """SFTok-L, the base encoder with a large decoder: `sftok run imagenet256_sftok_l --data DIR --ranks 8`.

    As `imagenet256_sftok_b`. Published: rFID 1.21 at 8 steps. It has not been trained here.
    """
    return _imagenet256("imagenet256_sftok_l", "L", "SFTok-L as published, 64 tokens of 8,192 codes")


RECIPES = {
    recipe.__name__: recipe for recipe in (digits, digits_tiny, small64, imagenet256_sftok_b, imagenet256_sftok_l)
}
