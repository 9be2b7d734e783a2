"""Recipes for two CPU cores and for own images. A recipe is a claim: command, time and expected result are stated."""

from typing import NamedTuple

from flows.recipes.schema import EncodeConfig, EvaluateConfig, Recipe, SweepConfig
from flows.results.gate import GateConfig
from generator.config import (
    GENERATORS,
    AnyGeneratorConfig,
    GeneratorConfig,
    GeneratorTrainingConfig,
    MaskedConfig,
    SampleConfig,
)
from infra.training.config import OptimizerConfig, TrainingConfig
from sftok.config import (
    NO_ADVERSARY,
    TOKENIZERS,
    AlignmentStageConfig,
    AugmentConfig,
    DataConfig,
    FineTuneStageConfig,
    TeacherConfig,
    TeacherStageConfig,
    TokenizerConfig,
    TransformerConfig,
)


def _optimizer(lr: float, warmup_steps: int) -> OptimizerConfig:
    """Return the optimizer of small recipes: short warm-up, decay to a twentieth, short weight average."""
    return OptimizerConfig(lr=lr, end_lr=lr / 20, warmup_steps=warmup_steps, ema_decay=0.98)


def _training(steps: int, lr: float, batch_size: int = 32) -> TrainingConfig:
    """Return the training of a stage of small recipes."""
    return TrainingConfig(
        steps=steps, batch_size=batch_size, optimizer=_optimizer(lr, min(20, steps // 5)), checkpoint_every=100
    )


def _generator_training(steps: int, lr: float, batch_size: int, *, validate_every: int) -> GeneratorTrainingConfig:
    """Return the training of a generator, which keeps the weights with the lowest held-out NLL."""
    return GeneratorTrainingConfig.model_validate(
        {**_training(steps, lr, batch_size).as_json(), "validate_every": validate_every, "keep": "best"}
    )


class _Generator(NamedTuple):
    """A generator and its training."""

    model: AnyGeneratorConfig
    training: GeneratorTrainingConfig


def _views(count: int) -> tuple[str, ...]:
    """Return the centre view and `count` affine ones."""
    return ("center", *(f"affine-{k}" for k in range(1, count + 1)))


def digits() -> Recipe:
    """Handwritten digits at 32x32: the whole pipeline on two cores. `sftok run digits`.

    scikit-learn's 1,797 scans; under 8 minutes on two cores. Expected: a classifier trained on the real training images
    classifies at least 95 % of reconstructed held-out digits and at least 90 % of 1,000 generated ones as intended.
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
        warm_up=AlignmentStageConfig(training=_training(400, 3e-3), replacement="none"),
        align=AlignmentStageConfig(training=_training(700, 3e-3), replacement="self_forcing"),
        fine_tune=FineTuneStageConfig(
            training=_training(350, 2e-3), assignment="nearest", perceptual_weight=0, adversarial=NO_ADVERSARY
        ),
        encode=EncodeConfig(variants=_views(9)),
        generator=GENERATORS["toy"],
        train_generator=_generator_training(500, 3e-3, 64, validate_every=50),
        sample=SampleConfig(per_class=100, cfg_scale=2.0),
        evaluate=EvaluateConfig(class_reader=True, sweep=_sweep(_digits_masked())),
        gate=GateConfig(
            thresholds=(
                "reconstruction.psnr@*=0.5",
                "reconstruction.class_agreement@*=0.02",
                "generation.class_agreement=0.02",
                "generation.fd_random_same_n=0.1",
            )
        ),
    )


def digits_maskgit() -> Recipe:
    """`digits` with samples of the masked generator: `sftok run digits_maskgit`.

    Every stage up to the codes is that of `digits`, and so are both generators: after `sftok run digits` it takes under
    two minutes. Expected: at least 90 % of 1,000 generated digits are classified as intended.
    """
    full = digits()
    masked = _digits_masked()
    return Recipe.model_validate(
        full.model_copy(
            update={
                "name": "digits_maskgit",
                "description": "digits with a masked generator, 16 tokens of 256 codes",
                "generator": masked.model,
                "train_generator": masked.training,
                "sample": SampleConfig(per_class=100, cfg_scale=3.0),
                "evaluate": full.evaluate.model_copy(
                    update={"sweep": _sweep(_Generator(full.generator, full.train_generator))}
                ),
            }
        ).model_dump()
    )


def _digits_masked() -> _Generator:
    """Return a masked generator, half the size of the autoregressive one; it learns these codes in 400 steps."""
    model = MaskedConfig(width=96, layers=3, heads=3, ffn_width=384)
    return _Generator(model, _generator_training(400, 6e-3, 64, validate_every=100))


def _sweep(beside: _Generator) -> SweepConfig:
    """Return a sweep of guidance 1, 2, 4 and 6 at two temperatures, of the recipe's generator and a second one."""
    return SweepConfig(cfg_scales=(1.0, 2.0, 4.0, 6.0), generator=beside.model, train_generator=beside.training)


def digits_tiny() -> Recipe:
    """Every stage and component of `digits` in under 40 s, for tests; nothing is learnt in so few steps."""
    full = digits()
    narrow = TransformerConfig(width=32, layers=2, heads=2)
    few = _training(4, 1e-3, 8).model_copy(update={"checkpoint_every": 2, "log_every": 1})
    few_codes = full.train_generator.model_copy(
        update={"steps": 4, "validate_every": 2, "checkpoint_every": 2, "log_every": 1}
    )
    tiny_sweep = SweepConfig(
        cfg_scales=(1.0, 2.0),
        temperatures=(1.0,),
        masked_temperatures=(1.0,),
        per_class=1,
        generator=MaskedConfig(width=32, layers=1, heads=2, ffn_width=64),
        train_generator=few_codes,
    )
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
                "train_generator": few_codes,
                "sample": full.sample.model_copy(update={"per_class": 4, "samples_per_shard": 10}),
                "evaluate": full.evaluate.model_copy(update={"steps": (1, 2), "sweep": tiny_sweep}),
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
