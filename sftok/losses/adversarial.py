"""The adversarial loss on pixels: hinge losses, LeCAM, and the interface to a training loop (method.md 1.3)."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from sftok.config import AdversarialConfig
from sftok.losses.diff_augment import diff_augment
from sftok.losses.dino import Dino, check_dino_size, dino_view, load_dino
from sftok.losses.discriminator import (
    DinoDiscriminator,
    PatchDiscriminator,
    check_local_batch,
    check_patch_size,
    iterate_spectral_norms,
)


def hinge_generator(fake_logits: Tensor) -> Tensor:
    """Compute the generator's hinge loss: minus the mean logit of its images, float32."""
    return -fake_logits.float().mean()


def hinge_discriminator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Compute the discriminator's hinge loss, float32: real logits below 1 and fake logits above -1 cost."""
    return 0.5 * (F.relu(1 - real_logits.float()).mean() + F.relu(1 + fake_logits.float()).mean())


class LeCam:
    """LeCAM regularisation by moving averages of the discriminator's mean logits (Tseng et al. 2021).

    The averages are updated once per step, by the mean over its micro-batches on all ranks; the losses of a step use
    the averages from before it.
    """

    def __init__(self, decay: float, device: torch.device | str) -> None:
        self.decay = decay
        self.averages = torch.zeros(2, device=device)
        """of real and fake logits; they start at 0 without bias correction, as published."""
        self._sums = torch.zeros(3, device=device)
        """of the step's mean logits, real and fake, and their count."""

    def loss(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """Compute the regulariser of one micro-batch, float32, and keep its means for `end_step`."""
        real, fake = real_logits.float().mean(), fake_logits.float().mean()
        self._sums += torch.stack([real.detach(), fake.detach(), torch.ones_like(real)])
        average_real, average_fake = self.averages
        return F.relu(real - average_fake).square() + F.relu(average_real - fake).square()

    def end_step(self, total: Callable[[Tensor], Tensor]) -> None:
        """Update the averages by the means of the step; `total` sums a tensor over all ranks."""
        *means, count = total(self._sums)
        seen = torch.stack(means) / count
        # A step in which half precision overflowed is skipped here, too.
        self.averages.copy_(torch.where(seen.isfinite().all(), self.averages.lerp(seen, 1 - self.decay), self.averages))
        self._sums.zero_()


def alone(tensor: Tensor) -> Tensor:
    """Sum over ranks where there is only one."""
    return tensor


def check_image_size(config: AdversarialConfig, image_size: int) -> None:
    """Check before a run begins that the discriminator can process images of this size.

    Raises:
        ValueError: the side is too small, or not a multiple of DINO's patch size.
    """
    if config.kind == "dino":
        check_dino_size(image_size)
    else:
        check_patch_size(image_size, config.layers)


class Adversary:
    """A discriminator and its losses; the optimizer is the training loop's.

    In each step from `start_step` on, add `generator_loss` to the generator's loss, call `discriminator_loss` with the
    same images once per micro-batch, and call `end_step` after the optimizer's step on `named_parameters()`. Everything
    is computed in float32 whatever the autocast. Initial weights are drawn from torch's global generator.
    """

    def __init__(
        self,
        config: AdversarialConfig,
        *,
        steps: int,
        image_size: int,
        micro_batch: int,
        dino: bytes | Dino | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Build the discriminator, and check now what would otherwise fail at `start_step`.

        Args:
            config: its weight is above 0.
            steps: steps of the whole stage.
            image_size: side of the images, in pixels.
            micro_batch: images per call.
            dino: the file that `config.dino` names, or its network; given if and only if `config.kind` is "dino".
            device: device of the images.

        Raises:
            ValueError: `start_step` is never reached, the discriminator cannot process the image size or the batch, or
                the file does not hold DINO's weights.
        """
        assert config.weight > 0
        assert (dino is not None) == (config.kind == "dino")
        if config.start_step >= steps:
            raise ValueError(
                f"adversarial.start_step = {config.start_step} is not below training.steps = {steps}: the "
                "discriminator would never begin; lower start_step, or set adversarial.weight = 0"
            )
        check_image_size(config, image_size)
        if dino is not None:
            check_local_batch(micro_batch)
        self.config = config
        self.steps = steps - config.start_step
        """of the discriminator: the length of its schedule, which begins at `config.start_step`."""
        if dino is None:
            made: nn.Module = PatchDiscriminator(config.channels, config.layers)
        else:
            made = DinoDiscriminator(dino if isinstance(dino, Dino) else load_dino(dino))
        self.discriminator = made.to(device)
        self.lecam = LeCam(config.lecam_decay, device)

    def is_active(self, step: int) -> bool:
        """Return whether the discriminator is trained in `step`, counted from 0."""
        return step >= self.config.start_step

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Return the trained parameters: all of a patch discriminator, the heads on DINO."""
        return [(name, p) for name, p in self.discriminator.named_parameters() if p.requires_grad]

    @torch.autocast("cpu", enabled=False)
    @torch.autocast("cuda", enabled=False)
    def generator_loss(self, fakes_B3HW: Tensor, generator: torch.Generator) -> Tensor:
        """Compute the loss of reconstructions times `config.weight`; no gradient reaches the discriminator's weights.

        Args:
            fakes_B3HW: float RGB (B, 3, H, W), not clamped.
            generator: on the CPU; draws the augmentations.
        """
        frozen = {name: p.detach() for name, p in self.named_parameters()}
        logits = functional_call(self.discriminator, frozen, (self._seen(fakes_B3HW, generator),))
        return self.config.weight * hinge_generator(logits)

    @torch.autocast("cpu", enabled=False)
    @torch.autocast("cuda", enabled=False)
    def discriminator_loss(
        self, reals_B3HW: Tensor, fakes_B3HW: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the discriminator's loss of one micro-batch, and metrics to log; no gradient reaches the images.

        Args:
            reals_B3HW: float RGB in [0, 1], (B, 3, H, W).
            fakes_B3HW: their reconstructions, the same as for the generator's loss.
            generator: on the CPU; draws the augmentations.
        """
        real_logits = self.discriminator(self._seen(reals_B3HW.detach(), generator))
        fake_logits = self.discriminator(self._seen(fakes_B3HW.detach(), generator))
        hinge = hinge_discriminator(real_logits, fake_logits)
        lecam = self.lecam.loss(real_logits, fake_logits)
        loss = hinge + self.config.lecam_weight * lecam
        metrics = {"d_loss": loss, "d_real": real_logits.mean(), "d_fake": fake_logits.mean(), "lecam": lecam}
        return loss, {name: metric.detach() for name, metric in metrics.items()}

    def _seen(self, images_B3HW: Tensor, generator: torch.Generator) -> Tensor:
        """Augment images as the discriminator sees them."""
        images_B3HW = images_B3HW.float()
        if self.config.augment:
            images_B3HW = diff_augment(images_B3HW, generator)
        return dino_view(images_B3HW, generator) if self.config.kind == "dino" else images_B3HW

    def end_step(self, total: Callable[[Tensor], Tensor] = alone) -> None:
        """Update LeCAM's averages and the spectral norms, after the optimizer's step.

        `total` sums a tensor over all ranks.
        """
        self.lecam.end_step(total)
        iterate_spectral_norms(self.discriminator)

    def tensors(self) -> dict[str, Tensor]:
        """Return the state besides the trained parameters: LeCAM's averages and the vectors of the spectral norms."""
        parameters = dict(self.discriminator.named_parameters())
        buffers = {n: t for n, t in self.discriminator.state_dict().items() if n not in parameters}
        return {"lecam": self.lecam.averages, **buffers}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the state that `tensors` returned."""
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])
