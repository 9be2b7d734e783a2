"""Warm-up and distribution alignment: predict the teacher's codes from latent tokens and partly masked codes.

Shapes: B images, P proxy positions, V proxy codes.
"""

import functools

import torch
from torch import Tensor

from infra.compute.transfer import send
from infra.training.best import BestWeights
from infra.training.learner import Learner, OptimizerPlan
from infra.training.loop import (
    TrainingRun,
    TrainResult,
    Validation,
    autocast,
    generator_of,
    mean_over_ranks,
    over_micro_batches,
    seed_torch,
    train_loop,
)
from sftok.config import AlignmentStageConfig, DecodingConfig, TokenizerConfig
from sftok.losses.proxy import proxy_loss
from sftok.metrics.functional import psnr
from sftok.model.decoder import Decoder, random_mask
from sftok.model.iterative_decoding import decode_steps
from sftok.model.teacher import Teacher
from sftok.model.tokenizer import SFTok
from sftok.training.common import TrainingImages, in_passes, set_up, share_used
from sftok.training.flops import alignment_effort
from sftok.weights.artifacts import save_tokenizer

TEACHER_AGREEMENT = 0.9  # smallest share of the teacher's codes that half precision must leave as in fp32


def train_alignment(
    images: TrainingImages,
    config: AlignmentStageConfig,
    *,
    teacher: Teacher,
    start: SFTok | TokenizerConfig,
    image_size: int,
    run: TrainingRun,
) -> TrainResult:
    """Train the tokenizer by warm-up or alignment (method.md 1.3).

    Args:
        images: training and held-out images.
        config: config of the stage.
        teacher: frozen.
        start: the tokenizer of the previous stage, or a config to start from random weights.
        image_size: side of the images, in pixels.
        run: output folder, seed, device and ranks.

    Raises:
        ValueError: alignment would start without a tokenizer, and the config does not say from scratch.
    """
    if not isinstance(start, SFTok) and config.replacement != "none" and not config.from_scratch:
        raise ValueError("alignment starts from a warmed-up tokenizer: run warm_up first, or set from_scratch = true")
    seed_torch(run.seed, run.device)
    model = start if isinstance(start, SFTok) else SFTok(start, teacher.config, image_size, pixels=False)
    if not isinstance(start, SFTok):
        model.initialise()
    training = config.training
    model.to(run.device).requires_grad_(True).train()
    teacher.to(run.device)
    set_up([model.encoder, model.decoder], training)
    if training.compile and torch.device(run.device).type == "cuda":
        set_up([teacher.encoder.to(memory_format=torch.channels_last)], training)
    learner = Learner(model, OptimizerPlan.of(training, run.ranks))
    losses_of = learner.spread(functools.partial(alignment_losses, model, config=config))
    stream, held_out = images.stream(run, training), images.held_out(run)
    same = teacher_agreement(teacher, held_out, config, run)

    def step(step: int) -> dict[str, Tensor | float]:
        def part(part: int) -> dict[str, Tensor]:
            batch = stream.batch(step, part)
            proxy_BP = teacher_codes(teacher, batch, config)
            losses = losses_of(proxy_BP, batch, generator=generator_of(run.seed, "mask", step, part))
            learner.backward(losses["loss"])
            return losses

        return over_micro_batches(part, step, training.micro_batches, run=run, learners=[learner]) | learner.update(
            step
        )

    def validate(_: int) -> Validation:
        with learner.averaged():
            return _validate(model, teacher, held_out, training.at_once, run)

    effort = alignment_effort(config, model.config, teacher.config, image_size)
    best = BestWeights(learner, "val_agreement_8", higher=True) if training.keep == "best" else None
    end = train_loop({"model": learner}, step, training, run=run, validate=validate, best=best, effort=effort)
    with learner.averaged():
        files = save_tokenizer(model, run.out) if run.ranks.is_first else []
    return TrainResult([*files, *end.files], {"steps": training.steps}, end.validation | same | end.speed)


def teacher_codes(teacher: Teacher, images: Tensor, config: AlignmentStageConfig) -> Tensor:
    """Compute proxy codes (B, P) in the teacher's precision of the stage."""
    with autocast(config.teacher_precision, images.device.type):
        return teacher.encode(images)


def teacher_agreement(
    teacher: Teacher, images: Tensor, config: AlignmentStageConfig, run: TrainingRun
) -> dict[str, float]:
    """Compute the share of held-out proxy codes that the stage's precision leaves as in fp32; empty for fp32.

    Raises:
        ValueError: the share is below `TEACHER_AGREEMENT`.
    """
    if config.teacher_precision == "fp32":
        return {}
    parts = images.split(config.training.at_once)
    equal = [teacher_codes(teacher, part, config) == teacher.encode(part) for part in parts]
    if (share := mean_over_ranks(equal, run)) < TEACHER_AGREEMENT:
        raise ValueError(
            f'teacher_precision = "{config.teacher_precision}": {100 * share:.1f} % of the teacher\'s codes are those '
            f"of fp32, less than {100 * TEACHER_AGREEMENT:.0f} %; set it to fp32"
        )
    return {"teacher_agreement": share}


def alignment_losses(
    model: SFTok, proxy_BP: Tensor, images: Tensor, *, config: AlignmentStageConfig, generator: torch.Generator
) -> dict[str, Tensor]:
    """Compute the losses of one micro-batch; images are encoded once, for the guide and the pass with gradients."""
    with autocast(config.training.precision, images.device.type):
        quantized = model.encode(images, config.assignment)
        ids_BP = decoder_inputs(model.decoder, quantized.z_q.detach(), proxy_BP, config, generator)
        logits_BPV = model.decoder(ids_BP, quantized.z_q)
    hidden_BP = ids_BP == model.decoder.mask_id
    cross_entropy = proxy_loss(
        logits_BPV,
        proxy_BP,
        hidden_BP,
        unmasked_weight=config.unmasked_weight,
        label_smoothing=config.label_smoothing,
    )
    with torch.no_grad():
        right_BP = (logits_BPV.argmax(-1) == proxy_BP) & hidden_BP
        agreement = right_BP.sum() / hidden_BP.sum().clamp_min(1)
    loss = cross_entropy + config.quantizer_weight * quantized.loss
    return {"loss": loss, "cross_entropy": cross_entropy, "agreement": agreement}


@torch.no_grad()
def decoder_inputs(
    decoder: Decoder,
    z_q: Tensor,
    proxy_BP: Tensor,
    config: AlignmentStageConfig,
    generator: torch.Generator,
) -> Tensor:
    """Build the decoder's training input (B, P): proxy codes, replaced by `config.replacement`, then masked."""
    if config.replacement == "none":
        return decoder.all_masked(z_q)
    given_BP = proxy_BP
    if config.replacement == "self_forcing":
        guide_BP = self_prediction(decoder, z_q, config.guide_steps)
        replaced_BP = torch.rand(proxy_BP.shape, generator=generator) < config.replace_prob
        given_BP = torch.where(send(replaced_BP, proxy_BP.device), guide_BP, proxy_BP)
    hidden_BP = random_mask(proxy_BP.shape, generator, config.mask_schedule, config.mask_power)
    return given_BP.masked_fill(send(hidden_BP, proxy_BP.device), decoder.mask_id)


@torch.no_grad()
def self_prediction(decoder: Decoder, z_q: Tensor, num_steps: int = 1) -> Tensor:
    """Predict the guide of SFVR from z_q alone, (B, P); the paper's guide has one step."""
    return decode_steps(decoder, decoder.all_masked(z_q), z_q, num_steps=num_steps)[0]


@torch.no_grad()
def _validate(model: SFTok, teacher: Teacher, images: Tensor, at_once: int, run: TrainingRun) -> Validation:
    """Measure code agreement and PSNR on held-out images in one and eight steps, and codebook usage; draw pictures."""

    def work(images: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
        proxy_BP, codes_BN = teacher.encode(images), model.encode(images).codes
        metrics, rows = {"codes": codes_BN}, [images, teacher.decode(proxy_BP)]
        for num_steps in (1, 8):
            predicted_BP, _ = model.predict_proxy(codes_BN, DecodingConfig(num_steps=num_steps))
            decoded = teacher.decode(predicted_BP)
            metrics[f"val_agreement_{num_steps}"] = predicted_BP == proxy_BP
            metrics[f"val_psnr_{num_steps}"] = psnr(decoded, images)
            rows.append(decoded)
        return metrics, rows

    found, picture = in_passes(work, images, at_once)
    usage = share_used(torch.cat(found.pop("codes")), model.config.codebook_size, run)
    means = {name: mean_over_ranks(values, run) for name, values in found.items()}
    return Validation({"val_code_usage": usage, **means}, {"reconstructions": picture})
