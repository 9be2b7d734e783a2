"""Training of the teacher on the data, if no weights are given: losses on pixels, and the codebook.

Shapes: B images, M latents, C channels of a code, V codes.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from infra.training.best import BestWeights
from infra.training.learner import Learner, OptimizerPlan
from infra.training.loop import (
    Checkpointable,
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
from sftok.config import TeacherStageConfig
from sftok.losses.proxy import vq_loss
from sftok.metrics.functional import psnr
from sftok.model.teacher import Teacher
from sftok.training.common import TrainingImages, Weights, in_passes, set_up, share_used
from sftok.training.flops import teacher_effort
from sftok.training.pixel_losses import PixelLosses
from sftok.weights.artifacts import save_teacher


def train_teacher(
    images: TrainingImages, config: TeacherStageConfig, *, run: TrainingRun, weights: Weights
) -> TrainResult:
    """Train a teacher on the images: reconstruction, perceptual and adversarial losses, codebook and commitment.

    Args:
        images: training and held-out images.
        config: config of the stage.
        run: output folder, seed, device and ranks.
        weights: reads pretrained weights.
    """
    seed_torch(run.seed, run.device)
    training = config.training
    model = Teacher(config.model).to(torch.device(run.device), memory_format=torch.channels_last)  # type: ignore[call-overload]
    set_up([model.encoder, model.decoder], training)
    learner = Learner(model, OptimizerPlan.of(training, run.ranks))
    forward = learner.spread(model)
    stream, held_out = images.stream(run, training), images.held_out(run)
    pixels = PixelLosses.of(config, held_out.shape[-1], run=run, weights=weights)
    restart = CodebookRestart(model, config, run)

    def step(step: int) -> dict[str, Tensor | float]:
        if restart.is_due(step):
            restart.replace(step, stream.batch(step, 0))

        def part(part: int) -> dict[str, Tensor]:
            batch = stream.batch(step, part)
            with autocast(training.precision, run.device):
                out = forward(batch)
            latents, quantized = out.latents.float(), out.quantized.float()
            loss, metrics = pixels.of_batch(out.images.float(), batch, step, part)
            loss = loss + vq_loss(latents, quantized, config.commitment_weight)
            learner.backward(loss)
            restart.count(out.codes)
            return {"loss": loss, **metrics}

        learners = [learner, *pixels.learners]
        metrics = over_micro_batches(part, step, training.micro_batches, run=run, learners=learners)
        return metrics | learner.update(step) | pixels.update(step)

    @torch.no_grad()
    def validate(_: int) -> Validation:
        def work(images: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
            codes = model.encode(images)
            decoded = model.decode(codes)
            return {"codes": codes, "val_psnr": psnr(decoded, images)}, [images, decoded]

        with learner.averaged():
            found, picture = in_passes(work, held_out, training.at_once)
        metrics = {
            "val_psnr": mean_over_ranks(found["val_psnr"], run),
            "val_code_usage": share_used(torch.cat(found["codes"]), config.model.codebook_size, run),
        }
        return Validation(metrics, {"reconstructions": picture})

    saved: dict[str, Checkpointable] = {"model": learner, "restart": restart, **pixels.saved()}
    best = BestWeights(learner, "val_psnr", higher=True) if training.keep == "best" else None
    effort = teacher_effort(config, held_out.shape[-1])
    end = train_loop(saved, step, training, run=run, validate=validate, best=best, effort=effort)
    with learner.averaged():
        files = save_teacher(model, run.out) if run.ranks.is_first else []
    return TrainResult([*files, *end.files], {"steps": training.steps}, end.validation | end.speed)


class CodebookRestart:
    """Initialises the codebook with latents of the data, and moves unused codes to latents far from the others."""

    def __init__(self, model: Teacher, config: TeacherStageConfig, run: TrainingRun) -> None:
        self.model, self.every, self.run = model, config.restart_every, run
        self.until = config.training.steps // 2
        self.used = torch.zeros(config.model.codebook_size, dtype=torch.int64, device=model.codebook.weight.device)

    def is_due(self, step: int) -> bool:
        """Return whether codes are replaced before this step."""
        return step == 0 or (self.every > 0 and step % self.every == 0 and step < self.until)

    @torch.no_grad()
    def replace(self, step: int, images_B3HW: Tensor) -> None:
        """Replace unused codes by latents of these images, the same on every rank.

        GPUs may round latents in several ways, and another pick would be another code, so the first rank's count.
        """
        used = self.run.ranks.total(self.used)
        latents_MC = self.model.encoder(images_B3HW).permute(0, 2, 3, 1).flatten(0, 2)
        unused = (used == 0).nonzero()[:, 0]
        kept_VC = self.model.codebook.weight[used > 0]
        seeds = generator_of(self.run.seed, "restart", step)
        self.model.codebook.weight[unused] = spread_out(latents_MC, kept_VC, len(unused), seeds)
        self.run.ranks.spread_(self.model.codebook.weight)
        self.used.zero_()

    def count(self, codes_BP: Tensor) -> None:
        """Count the codes that a step used."""
        codes_M = codes_BP.flatten()
        self.used.scatter_add_(0, codes_M, torch.ones_like(codes_M))  # bincount would make the host wait for the codes

    def tensors(self) -> dict[str, Tensor]:
        """Return the counts of all ranks since the last restart."""
        return {"used": self.run.ranks.total(self.used)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the counts, which from now on are the first rank's."""
        self.used.copy_(tensors["used"] * self.run.ranks.is_first)


def spread_out(latents_MC: Tensor, kept_VC: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Pick `count` latents far from each other and from the kept codes (k-means++), (count, C).

    A uniform choice would crowd codes where latents are dense, such as on a plain background, and its many equal codes
    could not be predicted.
    """
    nearest_M = torch.full((len(latents_MC),), torch.inf, device=latents_MC.device)
    if len(kept_VC):
        nearest_M = torch.cdist(latents_MC, kept_VC).amin(1).square()
    picked = []
    for uniform in torch.rand(count, generator=generator, dtype=torch.float64).tolist():
        weight_M = torch.ones_like(nearest_M) if nearest_M.isinf().all() else nearest_M
        # Summed on the CPU, always in the same order; the host has to wait for the index anyway.
        cumulative_M = weight_M.double().cpu().cumsum(0)
        index = int(torch.searchsorted(cumulative_M, uniform * cumulative_M[-1]).clamp(max=len(latents_MC) - 1))
        picked.append(latents_MC[index])
        nearest_M = torch.minimum(nearest_M, (latents_MC - latents_MC[index]).square().sum(1))
    return torch.stack(picked) if picked else latents_MC[:0]
