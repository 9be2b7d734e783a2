"""The adversarial part of a loss on pixels: hinge losses, LeCAM, and what a training loop calls (method.md 1.3)."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from sftok.config import AdversarialConfig
from sftok.losses.diff_augment import diff_augment
from sftok.losses.dino import check_dino_size, dino_view, load_dino
from sftok.losses.discriminator import (
    DinoDiscriminator,
    PatchDiscriminator,
    check_local_batch,
    check_patch_size,
    iterate_spectral_norms,
)


def hinge_generator(fake_logits: Tensor) -> Tensor:
    """What the generator lowers: minus the mean logit of its images, float32."""
    return -fake_logits.float().mean()


def hinge_discriminator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """What the discriminator lowers: logits of real images below 1 and of the generator's above -1, float32."""
    return 0.5 * (F.relu(1 - real_logits.float()).mean() + F.relu(1 + fake_logits.float()).mean())


class LeCam:
    """A pull of the discriminator's mean logits towards where those of the other kind have been (Tseng et al. 2021).

    The averages change once a step, by the mean over its micro-batches on all ranks; a loss sees those of before.
    """

    def __init__(self, decay: float, device: torch.device | str) -> None:
        self.decay = decay
        self.averages = torch.zeros(2, device=device)
        """of real and fake logits; from 0, without correction, as published."""
        self._sums = torch.zeros(3, device=device)
        """of the step's means, real and fake, and how many there are."""

    def loss(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """The regulariser of one micro-batch, float32, whose means are kept for `end_step`."""
        real, fake = real_logits.float().mean(), fake_logits.float().mean()
        self._sums += torch.stack([real.detach(), fake.detach(), torch.ones_like(real)])
        average_real, average_fake = self.averages
        return F.relu(real - average_fake).square() + F.relu(average_real - fake).square()

    def end_step(self, total: Callable[[Tensor], Tensor]) -> None:
        """Move the averages by what the step has seen; `total` sums a tensor over all ranks."""
        *means, count = total(self._sums)
        seen = torch.stack(means) / count
        # A step that half precision overflowed in is left out, here too.
        self.averages.copy_(torch.where(seen.isfinite().all(), self.averages.lerp(seen, 1 - self.decay), self.averages))
        self._sums.zero_()


def alone(tensor: Tensor) -> Tensor:
    """The sum over ranks where there is one."""
    return tensor


def check_image_size(config: AdversarialConfig, image_size: int) -> None:
    """Refuse, before a run begins, images that its discriminator could not take when its first step comes.

    Raises:
        ValueError: the side of the images is too small, or no multiple of DINO's patches.
    """
    if config.kind == "dino":
        check_dino_size(image_size)
    else:
        check_patch_size(image_size, config.layers)


class Adversary:
    """A discriminator and its losses; the optimizer is the training loop's.

    A step, from `start_step` on: `generator_loss` is added to the generator's; `discriminator_loss` is called with the
    same images, once a micro-batch; after the optimizer's step on `named_parameters()`, `end_step`. All is computed in
    float32 whatever the autocast. Initial weights are drawn from torch's global generator.
    """

    def __init__(
        self,
        config: AdversarialConfig,
        *,
        steps: int,
        image_size: int,
        micro_batch: int,
        dino: bytes | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """What could not work is refused here, not only when `start_step` comes.

        Args:
            config: its weight is above 0.
            steps: of the whole stage.
            image_size: side of the images, in pixels.
            micro_batch: images a call.
            dino: the file that `config.dino` names; given just if `config.kind` is "dino".
            device: where the images will be.

        Raises:
            ValueError: a start that never comes, a size or a batch that the discriminator cannot take, or a file that
                does not hold DINO's weights.
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
        """that the discriminator trains for: the length of its schedule, which begins at `config.start_step`."""
        made = (
            PatchDiscriminator(config.channels, config.layers) if dino is None else DinoDiscriminator(load_dino(dino))
        )
        self.discriminator = made.to(device)
        self.lecam = LeCam(config.lecam_decay, device)

    def is_active(self, step: int) -> bool:
        """Whether `step`, counted from 0, has a discriminator."""
        return step >= self.config.start_step

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """What is trained: all of a patch discriminator, the heads on a DINO."""
        return [(name, p) for name, p in self.discriminator.named_parameters() if p.requires_grad]

    @torch.autocast("cpu", enabled=False)
    @torch.autocast("cuda", enabled=False)
    def generator_loss(self, fakes_B3HW: Tensor, generator: torch.Generator) -> Tensor:
        """The loss of reconstructions, times `config.weight`; no gradient reaches the discriminator's weights.

        Args:
            fakes_B3HW: float RGB (B, 3, H, W), not clamped.
            generator: on the CPU; draws what the discriminator gets to see.
        """
        frozen = {name: p.detach() for name, p in self.named_parameters()}
        logits = functional_call(self.discriminator, frozen, (self._seen(fakes_B3HW, generator),))
        return self.config.weight * hinge_generator(logits)

    @torch.autocast("cpu", enabled=False)
    @torch.autocast("cuda", enabled=False)
    def discriminator_loss(
        self, reals_B3HW: Tensor, fakes_B3HW: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminator's loss of one micro-batch, and figures to log; no gradient reaches the images.

        Args:
            reals_B3HW: float RGB in [0, 1], (B, 3, H, W).
            fakes_B3HW: their reconstructions, of which the generator has had its gradient.
            generator: on the CPU; draws what the discriminator gets to see.
        """
        real_logits = self.discriminator(self._seen(reals_B3HW.detach(), generator))
        fake_logits = self.discriminator(self._seen(fakes_B3HW.detach(), generator))
        hinge = hinge_discriminator(real_logits, fake_logits)
        lecam = self.lecam.loss(real_logits, fake_logits)
        loss = hinge + self.config.lecam_weight * lecam
        figures = {"d_loss": loss, "d_real": real_logits.mean(), "d_fake": fake_logits.mean(), "lecam": lecam}
        return loss, {name: figure.detach() for name, figure in figures.items()}

    def _seen(self, images_B3HW: Tensor, generator: torch.Generator) -> Tensor:
        """Images as the discriminator sees them."""
        images_B3HW = images_B3HW.float()
        if self.config.augment:
            images_B3HW = diff_augment(images_B3HW, generator)
        return dino_view(images_B3HW, generator) if self.config.kind == "dino" else images_B3HW

    def end_step(self, total: Callable[[Tensor], Tensor] = alone) -> None:
        """Close a step, after the optimizer's: LeCAM's averages and the spectral norms follow.

        `total` sums a tensor over all ranks.
        """
        self.lecam.end_step(total)
        iterate_spectral_norms(self.discriminator)

    def tensors(self) -> dict[str, Tensor]:
        """The state between steps besides the trained parameters: LeCAM's averages, the spectral norms' vectors."""
        parameters = dict(self.discriminator.named_parameters())
        buffers = {n: t for n, t in self.discriminator.state_dict().items() if n not in parameters}
        return {"lecam": self.lecam.averages, **buffers}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` gave."""
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])
