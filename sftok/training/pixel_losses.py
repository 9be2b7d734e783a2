"""The losses of a stage that is trained on pixels, with the training of the discriminator."""

import torch
import torch.nn.functional as F
from torch import Tensor

from infra.training.learner import Learner, OptimizerPlan
from infra.training.loop import Checkpointable, TrainingRun, generator_of
from sftok.config import PixelStageConfig
from sftok.losses.adversarial import Adversary
from sftok.losses.perceptual import Lpips, load_lpips
from sftok.training.common import Weights


class PixelLosses:
    """Mean squared error, LPIPS if it has weights, and a discriminator from its first step on; all in float32."""

    def __init__(
        self, config: PixelStageConfig, *, run: TrainingRun, lpips: Lpips | None, adversary: Adversary | None
    ) -> None:
        self.config, self.run, self.lpips, self.adversary = config, run, lpips, adversary
        self.learner = None
        if adversary is not None:
            self.learner = _learner(adversary, config, run)
            self._discriminator_loss = self.learner.spread(adversary.discriminator_loss)

    @classmethod
    def of(cls, config: PixelStageConfig, image_size: int, *, run: TrainingRun, weights: Weights) -> "PixelLosses":
        """Build the losses with the networks of the config.

        Raises:
            ValueError: weights that the config names are missing.
        """
        lpips = adversary = None
        if config.perceptual_weight:
            lpips = load_lpips(weights(config.lpips, "LPIPS (lpips)")).to(run.device)
        if config.adversarial.weight:
            is_dino = config.adversarial.kind == "dino"
            adversary = Adversary(
                config.adversarial,
                steps=config.training.steps,
                image_size=image_size,
                micro_batch=config.training.micro_batch or config.training.batch_size,
                dino=weights(config.adversarial.dino, "DINO (adversarial.dino)") if is_dino else None,
                device=run.device,
            )
        return cls(config, run=run, lpips=lpips, adversary=adversary)

    def of_batch(self, images: Tensor, targets: Tensor, step: int, part: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a micro-batch, float (b, 3, S, S) each, and add to the discriminator's gradients.

        Returns:
            The loss of the network that made the images, and metrics to log.
        """
        error = F.mse_loss(images, targets)
        loss, metrics = self.config.reconstruction_weight * error, {"mse": error}
        if self.lpips is not None:
            metrics["lpips"] = self.lpips(images, targets).mean()
            loss = loss + self.config.perceptual_weight * metrics["lpips"]
        if self.adversary is None or not self.adversary.is_active(step):
            return loss, metrics
        adversarial = self.adversary.generator_loss(images, self._noise("generator", step, part))
        metrics["adversarial"] = adversarial
        return loss + adversarial, metrics | self._discriminate(images, targets, step, part)

    def _discriminate(self, fakes: Tensor, reals: Tensor, step: int, part: int) -> dict[str, Tensor]:
        assert self.learner is not None
        loss, metrics = self._discriminator_loss(reals, fakes, self._noise("discriminator", step, part))
        self.learner.backward(loss)
        return metrics

    def update(self, step: int) -> dict[str, Tensor | float]:
        """Update the discriminator with the gradients of the step's micro-batches."""
        if self.adversary is None or self.learner is None or not self.adversary.is_active(step):
            return {}
        metrics = {f"d_{name}": value for name, value in self.learner.update(step).items()}
        self.adversary.end_step(self.run.ranks.total)
        return metrics

    @property
    def learners(self) -> list[Learner]:
        """Return the learner of the discriminator, if there is one."""
        return [] if self.learner is None else [self.learner]

    def saved(self) -> dict[str, Checkpointable]:
        """Return the state that checkpoints hold."""
        if self.adversary is None or self.learner is None:
            return {}
        return {"discriminator": self.learner, "adversary": self.adversary}

    def _noise(self, who: str, step: int, part: int) -> torch.Generator:
        return generator_of(self.run.seed, "augment", who, step, part)


def _learner(adversary: Adversary, config: PixelStageConfig, run: TrainingRun) -> Learner:
    plan = OptimizerPlan(
        config.adversarial.optimizer,
        adversary.steps,
        start=config.adversarial.start_step,
        micro_batches=config.training.micro_batches,
        may_skip=config.training.precision == "fp16",  # its images are computed in half precision
        ranks=run.ranks,
    )
    return Learner(adversary.discriminator, plan)
