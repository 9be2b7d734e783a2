"""Recipes for ImageNet at 256x256: the published tokenizers, and generators of the published size and of ours.

Published settings are from arXiv 2512.16910 and its code; nothing here has been trained by this project. Hours are
estimates, not measurements: a schedule's operations (generator/flops.py) at 40 % of the 312 TFLOP/s of eight A100.
"""

from typing import NamedTuple

from flows.recipes.schema import ComputeConfig, EncodeConfig, EvaluateConfig, Recipe
from generator.config import (
    GENERATORS,
    MASKED_GENERATORS,
    AnyGeneratorConfig,
    GeneratorTrainingConfig,
    SampleConfig,
)
from infra.training.config import OptimizerConfig, TrainingConfig
from sftok.config import (
    NO_ADVERSARY,
    TOKENIZERS,
    AdversarialConfig,
    AlignmentStageConfig,
    AugmentConfig,
    DataConfig,
    FineTuneStageConfig,
    TeacherConfig,
    TeacherStageConfig,
)


def _imagenet_training(
    steps: int, batch_size: int, micro_batch: int, *, warmup_steps: int, beta_2: float
) -> TrainingConfig:
    """Return a stage as published (method.md 1.3): fp16, AdamW at 1e-4 falling to 1e-5, a micro-batch per GPU of 8."""
    return TrainingConfig(
        steps=steps,
        batch_size=batch_size,
        micro_batch=micro_batch,
        optimizer=OptimizerConfig(
            lr=1e-4, end_lr=1e-5, warmup_steps=warmup_steps, betas=(0.9, beta_2), weight_decay=1e-4, ema_decay=0.999
        ),
        precision="fp16",
        keep_checkpoints=2,
        log_every=100,
        validate_every=50_000,
    )


class _Generator(NamedTuple):
    """A generator with its training and sampling."""

    model: AnyGeneratorConfig
    training: GeneratorTrainingConfig
    sample: SampleConfig


def _autoregressive(size: str, micro_batch: int) -> _Generator:
    """Return our generator: RAR's optimizer and length (400 epochs, 2,048 sequences per step, method.md 1.5).

    Codes are in their natural order. Queries and keys are normalised, as in RAR, because of its high learning rate.
    """
    optimizer = OptimizerConfig(
        lr=4e-4, end_lr=1e-5, warmup_steps=62_500, betas=(0.9, 0.96), weight_decay=0.03, ema_decay=0.9999
    )
    return _Generator(
        GENERATORS[size].model_copy(update={"qk_norm": True}),
        _generator_training(250_000, 2048, micro_batch, optimizer),
        SampleConfig(per_class=50, cfg_scale=2.0),
    )


def _maskgit() -> _Generator:
    """Return the paper's generator, schedule and sampling (method.md 1.5); its guidance of 4.5 is 5.5 here."""
    optimizer = OptimizerConfig(
        lr=2e-4, end_lr=1e-5, warmup_steps=10_000, betas=(0.9, 0.96), weight_decay=0.03, ema_decay=0.999
    )
    training = _generator_training(1_000_000, 1024, 128, optimizer)
    return _Generator(
        MASKED_GENERATORS["published"],
        training.model_copy(update={"label_smoothing": 0.1}),
        SampleConfig(per_class=50, cfg_scale=5.5, temperature=1.0, num_steps=8),
    )


def _generator_training(
    steps: int, batch_size: int, micro_batch: int, optimizer: OptimizerConfig
) -> GeneratorTrainingConfig:
    """Return the settings of both kinds: bf16, class dropout 0.1, a validation every 25,000 steps."""
    return GeneratorTrainingConfig(
        steps=steps,
        batch_size=batch_size,
        micro_batch=micro_batch,
        optimizer=optimizer,
        precision="bf16",
        class_dropout=0.1,
        keep_checkpoints=2,
        log_every=100,
        validate_every=25_000,
    )


def _imagenet256(name: str, size: str, description: str, generator: _Generator) -> Recipe:
    """Combine the paper's schedule for a tokenizer of a published size with a generator of its codes."""
    alignment = _imagenet_training(200_000, 256, 32, warmup_steps=10_000, beta_2=0.99)
    pixels = _imagenet_training(1_000_000, 128, 8, warmup_steps=5_000, beta_2=0.999)
    return Recipe(
        name=name,
        description=description,
        seed=42,
        compute=ComputeConfig(fp32="tf32", cudnn_benchmark=True),  # as published; what is measured stays IEEE
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
        encode=EncodeConfig(variants=("center", "flip")),
        generator=generator.model,
        train_generator=generator.training,
        sample=generator.sample,
        evaluate=EvaluateConfig(steps=(1, 2, 4, 8, 16)),
    )


def imagenet256_sftok_b() -> Recipe:
    """SFTok-B at 256x256, 64 tokens of 8,192 codes: `sftok run imagenet256_sftok_b --data DIR --ranks 8`.

    The schedule of arXiv 2512.16910 as far as it is published: 200,000 steps of warming up, 800,000 of alignment and
    1,000,000 of fine-tuning on eight GPUs. Published: rFID 1.44 at 8 steps (1.67 at 1). It has not been trained here.
    Its generator is that of `imagenet256_ar_b`. Needs the weights of the teacher (`teacher.pretrained`), of LPIPS
    (`fine_tune.lpips`) and of DINO (`fine_tune.adversarial.dino`).
    """
    return _imagenet256(
        "imagenet256_sftok_b", "B", "SFTok-B as published, 64 tokens of 8,192 codes", _autoregressive("B", 256)
    )


def imagenet256_sftok_l() -> Recipe:
    """SFTok-L, the base encoder with a large decoder: `sftok run imagenet256_sftok_l --data DIR --ranks 8`.

    As `imagenet256_sftok_b`. Published: rFID 1.21 at 8 steps. It has not been trained here.
    """
    return _imagenet256(
        "imagenet256_sftok_l", "L", "SFTok-L as published, 64 tokens of 8,192 codes", _autoregressive("B", 256)
    )


def imagenet256_ar_b() -> Recipe:
    """Autoregressive generator B on SFTok-B's codes: `sftok run imagenet256_ar_b --data DIR --ranks 8`.

    Up to the codes the stages are those of `imagenet256_sftok_b` and shared with it, so that only the generator is new.
    Ours: 98.3 M parameters (12 layers of width 768), 250,000 steps of 2,048 sequences in bf16, warm-up of 62,500,
    learning rate 4e-4 down to 1e-5; guidance 2. About 5 hours on eight A100 of 40 GB, estimated. Published: no gFID,
    since the paper has no autoregressive generator; expected: a gFID close to the masked one's 2.32. Not trained here.
    """
    return _imagenet256("imagenet256_ar_b", "B", "autoregressive, 98 M, on codes of SFTok-B", _autoregressive("B", 256))


def imagenet256_ar_l() -> Recipe:
    """Autoregressive generator L on SFTok-B's codes: `sftok run imagenet256_ar_l --data DIR --ranks 8`.

    As `imagenet256_ar_b` with 326.1 M parameters (24 layers of width 1,024). About 17 hours on eight A100 of 80 GB,
    estimated. Published: no gFID; expected: a gFID below B's. Not trained here.
    """
    return _imagenet256(
        "imagenet256_ar_l", "B", "autoregressive, 326 M, on codes of SFTok-B", _autoregressive("L", 128)
    )


def imagenet256_ar_xl() -> Recipe:
    """Autoregressive generator XL on SFTok-B's codes: `sftok run imagenet256_ar_xl --data DIR --ranks 8`.

    As `imagenet256_ar_b` with 753.7 M parameters (36 layers of width 1,280). About 41 hours on eight A100 of 80 GB,
    estimated. Published: no gFID; expected: a gFID below L's. Not trained here.
    """
    return _imagenet256(
        "imagenet256_ar_xl", "B", "autoregressive, 754 M, on codes of SFTok-B", _autoregressive("XL", 64)
    )


def imagenet256_ar_xxl() -> Recipe:
    """Autoregressive generator XXL on SFTok-B's codes: `sftok run imagenet256_ar_xxl --data DIR --ranks 8`.

    As `imagenet256_ar_b` with 1.386 B parameters (48 layers of width 1,536: the shape of LlamaGen's XXL, arXiv
    2406.06525). About 75 hours on eight A100 of 80 GB, estimated. Published: no gFID of these codes; expected: a gFID
    below XL's. Not trained here.
    """
    return _imagenet256(
        "imagenet256_ar_xxl", "B", "autoregressive, 1.4 B, on codes of SFTok-B", _autoregressive("XXL", 64)
    )


def imagenet256_ar_3b() -> Recipe:
    """Autoregressive generator 3B on SFTok-B's codes: `sftok run imagenet256_ar_3b --data DIR --ranks 8`.

    As `imagenet256_ar_b` with 3.044 B parameters (24 layers of width 3,200: the shape of LlamaGen's 3B, arXiv
    2406.06525). About 165 hours on eight A100 of 80 GB, estimated. Published: no gFID of these codes; expected: a gFID
    below XXL's. Not trained here.
    """
    return _imagenet256(
        "imagenet256_ar_3b", "B", "autoregressive, 3.0 B, on codes of SFTok-B", _autoregressive("3B", 64)
    )


def imagenet256_maskgit() -> Recipe:
    """The paper's masked generator on SFTok-B's codes: `sftok run imagenet256_maskgit --data DIR --ranks 8`.

    Up to the codes the stages are those of `imagenet256_sftok_b` and shared with it. Published: 183.5 M parameters (24
    layers of width 768, 16 heads), 1,000,000 steps of 1,024 sequences in bf16, label smoothing 0.1, learning rate 2e-4
    down to 1e-5, 8 steps at temperature 1 and guidance 4.5, which is 5.5 here; gFID 2.32, with unpublished settings.
    Ours: it reads codes of centre crops and their mirror images that were encoded once, where the published code
    encodes anew. About 20 hours on eight A100 of 40 GB, estimated. Not trained here.
    """
    return _imagenet256("imagenet256_maskgit", "B", "MaskGIT as published, 184 M, on codes of SFTok-B", _maskgit())
