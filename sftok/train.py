"""Training of the teacher and of the tokenizer's three stages: one loop (infra/training.py), each stage its step.

Shapes: B images, P proxy positions, V proxy codes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infra.schedule import TrainingConfig
from infra.training import Learner, Run, TrainResult, autocast, decay_matrices, generator_of, train_loop
from sftok.artifacts import save_teacher, save_tokenizer
from sftok.config import (
    AlignmentStageConfig,
    AugmentConfig,
    DecodingConfig,
    FineTuneStageConfig,
    TeacherStageConfig,
    TokenizerConfig,
)
from sftok.data import ImageRows, TrainImages
from sftok.decoder import Decoder, random_mask
from sftok.losses import proxy_loss, vq_loss
from sftok.metrics import psnr
from sftok.model import SFTok
from sftok.preprocess import to_float
from sftok.proxy import Teacher

VALIDATION_IMAGES = 256


@dataclass(frozen=True)
class TrainingImages:
    """The images that a stage learns from, and those that it is validated on."""

    train: ImageRows
    val: ImageRows
    augment: AugmentConfig

    def stream(self, run: Run, config: TrainingConfig) -> TrainImages:
        """Batches as a function of the step."""
        return TrainImages(self.train, self.augment, seed=run.seed, batch_size=config.batch_size)

    def held_out(self, run: Run) -> Tensor:
        """Images to validate on, float (n, 3, S, S)."""
        return to_float(self.val.images[:VALIDATION_IMAGES]).to(run.device)


def train_teacher(images: TrainingImages, config: TeacherStageConfig, *, run: Run) -> TrainResult:
    """Train a teacher on the images: mean squared error, codebook and commitment loss."""
    torch.manual_seed(run.seed)
    model = Teacher(config.model).to(torch.device(run.device), memory_format=torch.channels_last)  # type: ignore[call-overload]
    learner = _learner(model.named_parameters(), config.training)
    restart = CodebookRestart(model, config, run.seed)
    stream, held_out = images.stream(run, config.training), images.held_out(run)

    def step(step: int) -> dict[str, float]:
        batch = stream.batch(step).images.to(run.device)
        restart.before(step, batch)
        with autocast(config.training.precision, run.device):
            out = model(batch)
            error = F.mse_loss(out.images, batch)
            loss = error + vq_loss(out.latents, out.quantized, config.commitment_weight)
        restart.count(out.codes)
        return {"loss": loss.item(), "mse": error.item(), **learner.update(loss, step)}

    @torch.no_grad()
    def validate(_: int) -> dict[str, float]:
        with learner.averaged():
            codes = model.encode(held_out)
            usage = codes.unique().numel() / config.model.codebook_size
            return {"val_psnr": psnr(model.decode(codes), held_out).mean().item(), "val_code_usage": usage}

    end = train_loop({"model": learner, "restart": restart}, step, config.training, run=run, validate=validate)
    with learner.averaged():
        files = save_teacher(model, run.out)
    return TrainResult([*files, end.log], {"steps": config.training.steps}, end.validation)


class CodebookRestart:
    """Starts the codebook at latents of the data, and moves codes that nothing uses to where the others are far."""

    def __init__(self, model: Teacher, config: TeacherStageConfig, seed: int) -> None:
        self.model, self.every, self.seed = model, config.restart_every, seed
        self.until = config.training.steps // 2
        self.used = torch.zeros(config.model.codebook_size, dtype=torch.int64, device=model.codebook.weight.device)

    @torch.no_grad()
    def before(self, step: int, images_B3HW: Tensor) -> None:
        """Called before each step with its images; replaces codes where it is time to."""
        is_due = step == 0 or (self.every > 0 and step % self.every == 0 and step < self.until)
        if not is_due:
            return
        latents_MC = self.model.encoder(images_B3HW).permute(0, 2, 3, 1).flatten(0, 2)
        unused = (self.used == 0).nonzero()[:, 0]
        kept_VC = self.model.codebook.weight[self.used > 0]
        seeds = generator_of(self.seed, "restart", step)
        self.model.codebook.weight[unused] = spread_out(latents_MC, kept_VC, len(unused), seeds)
        self.used.zero_()

    def count(self, codes_BP: Tensor) -> None:
        """Note which codes a step used."""
        self.used += torch.bincount(codes_BP.flatten(), minlength=len(self.used))

    def tensors(self) -> dict[str, Tensor]:
        """The counts since the last restart."""
        return {"used": self.used}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the counts."""
        self.used.copy_(tensors["used"])


def spread_out(latents_MC: Tensor, kept_VC: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Pick `count` latents far from each other and from those kept (k-means++), (count, C).

    Picking uniformly would crowd codes where latents are dense, such as a plain background, whose many equal codes
    nothing could then predict.
    """
    nearest_M = torch.full((len(latents_MC),), torch.inf, device=latents_MC.device)
    if len(kept_VC):
        nearest_M = torch.cdist(latents_MC, kept_VC).amin(1).square()
    picked = []
    for uniform in torch.rand(count, generator=generator, dtype=torch.float64).tolist():
        weight_M = torch.ones_like(nearest_M) if nearest_M.isinf().all() else nearest_M
        cumulative_M = weight_M.double().cumsum(0)
        index = int(torch.searchsorted(cumulative_M, uniform * cumulative_M[-1]).clamp(max=len(latents_MC) - 1))
        picked.append(latents_MC[index])
        nearest_M = torch.minimum(nearest_M, (latents_MC - latents_MC[index]).square().sum(1))
    return torch.stack(picked) if picked else latents_MC[:0]


def train_alignment(
    images: TrainingImages,
    config: AlignmentStageConfig,
    *,
    teacher: Teacher,
    start: SFTok | TokenizerConfig,
    image_size: int,
    run: Run,
) -> TrainResult:
    """Warm up or align: predict the teacher's codes from latent tokens and partly masked codes (METHOD 1.3).

    Args:
        images: what to learn from.
        config: the stage.
        teacher: frozen.
        start: the tokenizer of the stage before, or a config to start from random weights.
        image_size: side of the images, in pixels.
        run: where to write.
    """
    torch.manual_seed(run.seed)
    model = start if isinstance(start, SFTok) else SFTok(start, teacher.config, image_size, pixels=False)
    if not isinstance(start, SFTok):
        model.initialise()
    model.to(run.device).requires_grad_(True).train()
    teacher.to(run.device)
    learner = _learner(model.named_parameters(), config.training)
    stream, held_out = images.stream(run, config.training), images.held_out(run)

    def step(step: int) -> dict[str, float]:
        batch = stream.batch(step).images.to(run.device)
        proxy_BP = teacher.encode(batch)
        with autocast(config.training.precision, run.device):
            quantized = model.encode(batch, config.assignment)
            ids_BP = decoder_inputs(
                model.decoder, quantized.z_q.detach(), proxy_BP, config, generator_of(run.seed, "mask", step)
            )
            logits_BPV = model.decoder(ids_BP, quantized.z_q)
        hidden_BP = ids_BP == model.decoder.mask_id
        cross_entropy = proxy_loss(
            logits_BPV,
            proxy_BP,
            hidden_BP,
            unmasked_weight=config.unmasked_weight,
            label_smoothing=config.label_smoothing,
        )
        loss = cross_entropy + config.quantizer_weight * quantized.loss
        agreement = (logits_BPV.argmax(-1) == proxy_BP)[hidden_BP].float().mean()
        figures = {"loss": loss.item(), "cross_entropy": cross_entropy.item(), "agreement": agreement.item()}
        return figures | learner.update(loss, step)

    def validate(_: int) -> dict[str, float]:
        with learner.averaged():
            return _proxy_agreement(model, teacher, held_out)

    end = train_loop({"model": learner}, step, config.training, run=run, validate=validate)
    with learner.averaged():
        files = save_tokenizer(model, run.out)
    return TrainResult([*files, end.log], {"steps": config.training.steps}, end.validation)


@torch.no_grad()
def decoder_inputs(
    decoder: Decoder,
    z_q: Tensor,
    proxy_BP: Tensor,
    config: AlignmentStageConfig,
    generator: torch.Generator,
) -> Tensor:
    """What the decoder sees in training, (B, P): proxy codes, replaced by `config.replacement`, then masked."""
    if config.replacement == "none":
        return decoder.all_masked(z_q)
    given_BP = proxy_BP
    if config.replacement == "self_forcing":
        guide_BP = first_step_prediction(decoder, z_q)
        replaced_BP = torch.rand(proxy_BP.shape, generator=generator) < config.replace_prob
        given_BP = torch.where(replaced_BP.to(proxy_BP.device), guide_BP, proxy_BP)
    hidden_BP = random_mask(proxy_BP.shape, generator).to(proxy_BP.device)
    return given_BP.masked_fill(hidden_BP, decoder.mask_id)


@torch.no_grad()
def first_step_prediction(decoder: Decoder, z_q: Tensor) -> Tensor:
    """The guide of SFVR: what the decoder predicts with everything masked, (B, P)."""
    return decoder(decoder.all_masked(z_q), z_q).argmax(-1)


def train_fine_tune(
    images: TrainingImages, config: FineTuneStageConfig, *, teacher: Teacher, start: SFTok, run: Run
) -> TrainResult:
    """Fine-tune towards pixels: encoder and quantizer frozen, decoder and pixel decoder trained (METHOD 1.3)."""
    torch.manual_seed(run.seed)
    model = SFTok(start.config, start.teacher_config, start.image_size, pixels=True)
    model.take_weights(start)
    model.take_pixel_decoder(teacher)
    model.to(run.device).requires_grad_(False)
    trained = [(n, p) for n, p in model.named_parameters() if n.startswith(("decoder.", "pixel_"))]
    for _, parameter in trained:
        parameter.requires_grad_(True)
    learner = _learner(trained, config.training)
    stream, held_out = images.stream(run, config.training), images.held_out(run)

    def step(step: int) -> dict[str, float]:
        batch = stream.batch(step).images.to(run.device)
        with autocast(config.training.precision, run.device):
            z_q = model.encode(batch, config.assignment).z_q
            guide_BP = first_step_prediction(model.decoder, z_q)
            hidden_BP = random_mask(guide_BP.shape, generator_of(run.seed, "mask", step)).to(run.device)
            logits_BPV = model.decoder(guide_BP.masked_fill(hidden_BP, model.decoder.mask_id), z_q)
            reconstruction = model.soft_decode(logits_BPV.float())
        error = F.mse_loss(reconstruction.float(), batch)
        return {"loss": error.item(), **learner.update(config.reconstruction_weight * error, step)}

    @torch.no_grad()
    def validate(_: int) -> dict[str, float]:
        with learner.averaged():
            proxy_BP, logits_BPV = model.predict_proxy(model.encode(held_out).codes, DecodingConfig())
            return {"val_psnr": psnr(model.render(proxy_BP, logits_BPV, None), held_out).mean().item()}

    end = train_loop({"model": learner}, step, config.training, run=run, validate=validate)
    with learner.averaged():
        files = save_tokenizer(model, run.out)
    return TrainResult([*files, end.log], {"steps": config.training.steps}, end.validation)


def _learner(parameters: Iterable[tuple[str, nn.Parameter]], config: TrainingConfig) -> Learner:
    return Learner(parameters, config.optimizer, steps=config.steps, is_decayed=decay_matrices)


@torch.no_grad()
def _proxy_agreement(model: SFTok, teacher: Teacher, images: Tensor) -> dict[str, float]:
    """Share of proxy codes predicted right on held-out images in one step and in eight, and codebook usage."""
    proxy_BP, codes_BN = teacher.encode(images), model.encode(images).codes
    figures = {"val_code_usage": codes_BN.unique().numel() / model.config.codebook_size}
    for num_steps in (1, 8):
        predicted_BP, _ = model.predict_proxy(codes_BN, DecodingConfig(num_steps=num_steps))
        figures[f"val_agreement_{num_steps}"] = (predicted_BP == proxy_BP).float().mean().item()
    return figures
