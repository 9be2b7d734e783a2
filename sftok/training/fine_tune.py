"""Fine-tuning on pixels: encoder and quantizer frozen, decoder, pixel decoder and its codebook trained.

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
from sftok.config import DecodingConfig, FineTuneStageConfig
from sftok.metrics.functional import psnr
from sftok.model.decoder import random_mask
from sftok.model.teacher import Teacher
from sftok.model.tokenizer import SFTok
from sftok.training.alignment import self_prediction
from sftok.training.common import TrainingImages, Weights, in_passes, set_up
from sftok.training.flops import fine_tune_effort
from sftok.training.pixel_losses import PixelLosses
from sftok.weights.artifacts import save_tokenizer


def train_fine_tune(
    images: TrainingImages,
    config: FineTuneStageConfig,
    *,
    teacher: Teacher,
    start: SFTok,
    run: TrainingRun,
    weights: Weights,
) -> TrainResult:
    """Fine-tune the tokenizer on pixels (method.md 1.3, stage 3).

    Args:
        images: training and held-out images.
        config: config of the stage.
        teacher: its codebook and decoder initialise the pixel decoder.
        start: the tokenizer of the previous stage.
        run: output folder, seed, device and ranks.
        weights: reads pretrained weights.
    """
    seed_torch(run.seed, run.device)
    training = config.training
    model = with_pixel_decoder(start, teacher).to(run.device)
    assert model.pixel_decoder is not None
    model.pixel_decoder.to(memory_format=torch.channels_last)
    give_gradients_to_decoders(model)
    set_up([model.encoder, model.decoder, model.pixel_decoder], training)
    learner = Learner(model, OptimizerPlan.of(training, run.ranks))
    reconstruct = learner.spread(functools.partial(fine_tune_pass, model, config=config))
    pixels = PixelLosses.of(config, model.image_size, run=run, weights=weights)
    stream, held_out = images.stream(run, training), images.held_out(run)

    def step(step: int) -> dict[str, Tensor | float]:
        def part(part: int) -> dict[str, Tensor]:
            batch, masks = stream.batch(step, part), generator_of(run.seed, "mask", step, part)
            reconstruction = reconstruct(batch, masks=masks)
            loss, metrics = pixels.of_batch(reconstruction, batch, step, part)
            learner.backward(loss)
            return {"loss": loss, **metrics}

        learners = [learner, *pixels.learners]
        metrics = over_micro_batches(part, step, training.micro_batches, run=run, learners=learners)
        return metrics | learner.update(step) | pixels.update(step)

    @torch.no_grad()
    def validate(_: int) -> Validation:
        def work(images: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
            proxy_BP, logits_BPV = model.predict_proxy(model.encode(images).codes, DecodingConfig())
            decoded = model.render(proxy_BP, logits_BPV, None)
            return {"val_psnr": psnr(decoded, images)}, [images, decoded]

        with learner.averaged():
            found, picture = in_passes(work, held_out, training.at_once)
        return Validation({"val_psnr": mean_over_ranks(found["val_psnr"], run)}, {"reconstructions": picture})

    best = BestWeights(learner, "val_psnr", higher=True) if training.keep == "best" else None
    effort = fine_tune_effort(config, model.config, teacher.config, model.image_size)
    saved = {"model": learner, **pixels.saved()}
    end = train_loop(saved, step, training, run=run, validate=validate, best=best, effort=effort)
    with learner.averaged():
        files = save_tokenizer(model, run.out) if run.ranks.is_first else []
    return TrainResult([*files, *end.files], {"steps": training.steps}, end.validation | end.speed)


def with_pixel_decoder(start: SFTok, teacher: Teacher) -> SFTok:
    """Copy a tokenizer and give it a pixel decoder of its own, initialised from the teacher's."""
    model = SFTok(start.config, start.teacher_config, start.image_size, pixels=True)
    model.take_weights(start)
    model.take_pixel_decoder(teacher)
    return model


def give_gradients_to_decoders(model: SFTok) -> None:
    """Choose what is trained: decoder and pixel decoder with its codebook; encoder and quantizer are frozen."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("decoder.", "pixel_")))


def fine_tune_pass(model: SFTok, images: Tensor, *, config: FineTuneStageConfig, masks: torch.Generator) -> Tensor:
    """Reconstruct images by frozen encoder, partly masked self-prediction and pixel decoder, (B, 3, H, W)."""
    with autocast(config.training.precision, images.device.type):
        with torch.no_grad():
            z_q = model.encode(images, config.assignment).z_q
        guide_BP = self_prediction(model.decoder, z_q, config.guide_steps)
        hidden_BP = random_mask(guide_BP.shape, masks, config.mask_schedule, config.mask_power)
        logits_BPV = model.decoder(guide_BP.masked_fill(send(hidden_BP, images.device), model.decoder.mask_id), z_q)
        return model.soft_decode(logits_BPV.float()).float()
