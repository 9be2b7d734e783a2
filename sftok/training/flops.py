"""Count the operations of a training step of each stage, over all ranks, from those of the forward passes.

For each product of the forward pass, a trained network has two in the backward pass; a frozen network that gradients
pass through has one, and so does a first layer, whose input needs no gradient. Recomputed blocks count once: this is
the model's arithmetic, not the machine's.
"""

from infra.training.config import TrainingConfig
from infra.training.speed import Effort
from sftok.config import (
    AlignmentStageConfig,
    FineTuneStageConfig,
    PixelStageConfig,
    TeacherConfig,
    TeacherStageConfig,
    TokenizerConfig,
)
from sftok.losses import flops as loss_flops
from sftok.model import flops


def alignment_effort(
    config: AlignmentStageConfig, tokenizer: TokenizerConfig, teacher: TeacherConfig, image_size: int
) -> Effort:
    """Count a step of warm-up or alignment: the teacher's codes, the guide, encoder and decoder."""
    guides = config.guide_steps if config.replacement == "self_forcing" else 0
    image = (
        flops.teacher_encoder(teacher, image_size)
        + flops.nearest_code(teacher, image_size)
        + 3 * flops.encoder(tokenizer, image_size)
        - flops.patches(tokenizer, image_size)
        + flops.assignment(tokenizer)
        + (guides + 3) * flops.decoder(tokenizer, teacher, image_size)
    )
    return _effort(config.training, image, a_pass=3 * flops.codebook(tokenizer))


def fine_tune_effort(
    config: FineTuneStageConfig, tokenizer: TokenizerConfig, teacher: TeacherConfig, image_size: int
) -> Effort:
    """Count a step of fine-tuning: the frozen encoder, the guide, decoder and pixel decoder, losses on pixels."""
    image = (
        flops.encoder(tokenizer, image_size)
        + flops.assignment(tokenizer)
        + (config.guide_steps + 3) * flops.decoder(tokenizer, teacher, image_size)
        - flops.latents(tokenizer)
        + 3 * flops.soft_codes(teacher, image_size)
        + 3 * flops.teacher_decoder(teacher, image_size)
        + _perceptual(config, image_size)
    )
    effort = _effort(config.training, image, a_pass=flops.codebook(tokenizer))
    return _with_adversary(effort, config, image_size)


def teacher_effort(config: TeacherStageConfig, image_size: int) -> Effort:
    """Count a step of the teacher: encoder, distances from codes, decoder, losses on pixels."""
    model = config.model
    image = (
        3 * flops.teacher_encoder(model, image_size)
        - flops.teacher_first(model, image_size)
        + flops.nearest_code(model, image_size)
        + 3 * flops.teacher_decoder(model, image_size)
        + _perceptual(config, image_size)
    )
    return _with_adversary(_effort(config.training, image), config, image_size)


def _effort(training: TrainingConfig, image: int, a_pass: int = 0) -> Effort:
    step = training.batch_size * image + training.micro_batches * a_pass
    return Effort({"images": training.batch_size}, step, training.precision)


def _perceptual(config: PixelStageConfig, image_size: int) -> int:
    """LPIPS: its network on the image, with the image's gradient, and on the target."""
    if not config.perceptual_weight:
        return 0
    return 3 * loss_flops.vgg(image_size) + 2 * loss_flops.lpips_weights(image_size)


def _with_adversary(effort: Effort, config: PixelStageConfig, image_size: int) -> Effort:
    adversary = config.adversarial
    if not adversary.weight:
        return effort
    # Once with the image's gradient, then on the target and on the image, each with the gradients of the weights.
    if adversary.kind == "patch":
        whole, first = (
            loss_flops.patch_discriminator(adversary, image_size),
            loss_flops.patch_first(adversary, image_size),
        )
        image = (2 + 3 + 3) * whole - 2 * first
    else:
        whole, first = loss_flops.dino_heads(image_size), loss_flops.dino_heads_first(image_size)
        # Both factors of a product in attention depend on the image, so it has two in the backward pass, even frozen.
        image = (
            (2 + 1 + 1) * loss_flops.dino(image_size)
            + loss_flops.dino_attention(image_size)
            + (2 + 3 + 3) * whole
            - 2 * first
        )
    later = config.training.batch_size * image
    return Effort(effort.items, effort.flops, effort.precision, later, adversary.start_step)
