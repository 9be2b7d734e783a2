"""Count the memory of a GPU that each training of the tokenizer takes, from its configs, by a pass without contents."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infra.compute.dry_pass import META, backward, peak_bytes
from infra.training.config import TrainingConfig
from infra.training.loop import autocast
from infra.training.memory import FLOAT, MemoryNeed, Parameters, Spread, held
from sftok.config import (
    AlignmentStageConfig,
    FineTuneStageConfig,
    PixelStageConfig,
    TeacherConfig,
    TeacherStageConfig,
    TokenizerConfig,
)
from sftok.losses.adversarial import Adversary
from sftok.losses.dino import Dino
from sftok.losses.perceptual import Lpips
from sftok.losses.proxy import vq_loss
from sftok.model.teacher import Teacher
from sftok.model.tokenizer import SFTok
from sftok.training.alignment import alignment_losses, teacher_codes
from sftok.training.common import VALIDATION_IMAGES, set_up
from sftok.training.fine_tune import fine_tune_pass, give_gradients_to_decoders


class _Pass(NamedTuple):
    """The networks of a training on the meta device, and what it computes for a micro-batch."""

    networks: Sequence[nn.Module]
    """the trained one first; of the others, those with parameters that require gradients are trained, too."""
    work: Callable[[Tensor], None]
    """passes images forward and backward."""


def alignment_memory(
    config: AlignmentStageConfig,
    tokenizer: TokenizerConfig,
    teacher: TeacherConfig,
    image_size: int,
    *,
    ranks: int = 1,
    fused_attention: bool = True,
) -> MemoryNeed:
    """Return what warm-up or alignment takes on each of its ranks' GPUs."""
    with torch.device(META):
        model = SFTok(tokenizer, teacher, image_size, pixels=False).train()
        frozen = Teacher(teacher).requires_grad_(False)

    def work(images: Tensor) -> None:
        proxy_BP = teacher_codes(frozen, images, config)
        losses = alignment_losses(model, proxy_BP, images, config=config, generator=torch.Generator())
        backward(losses["loss"])

    made = _Pass((model, frozen), work)
    return _need(made, config.training, image_size, ranks, fused_attention)


def fine_tune_memory(
    config: FineTuneStageConfig,
    tokenizer: TokenizerConfig,
    teacher: TeacherConfig,
    image_size: int,
    *,
    ranks: int = 1,
    fused_attention: bool = True,
) -> MemoryNeed:
    """Return what fine-tuning takes on each of its ranks' GPUs, once the discriminator is trained, too."""
    with torch.device(META):
        model = SFTok(tokenizer, teacher, image_size, pixels=True)
    give_gradients_to_decoders(model)
    pixels = _PixelPass(config, image_size)

    def work(images: Tensor) -> None:
        backward(pixels.loss(fine_tune_pass(model, images, config=config, masks=torch.Generator()), images))

    return _need(_Pass((model, *pixels.networks), work), config.training, image_size, ranks, fused_attention)


def teacher_memory(
    config: TeacherStageConfig, image_size: int, *, ranks: int = 1, fused_attention: bool = True
) -> MemoryNeed:
    """Return what the teacher's training takes on each of its ranks' GPUs, once there is a discriminator, too."""
    with torch.device(META):
        model = Teacher(config.model)
    pixels = _PixelPass(config, image_size)

    def work(images: Tensor) -> None:
        with autocast(config.training.precision, META):
            out = model(images)
        latents, quantized = out.latents.float(), out.quantized.float()
        loss = pixels.loss(out.images.float(), images)
        backward(loss + vq_loss(latents, quantized, config.commitment_weight))

    return _need(_Pass((model, *pixels.networks), work), config.training, image_size, ranks, fused_attention)


class _PixelPass:
    """The losses of a stage that is trained on pixels, as `PixelLosses` computes them."""

    def __init__(self, config: PixelStageConfig, image_size: int) -> None:
        self.lpips: Lpips | None = None
        self.adversary: Adversary | None = None
        with torch.device(META):
            if config.perceptual_weight:
                self.lpips = Lpips()
            if config.adversarial.weight:
                training = config.training
                self.adversary = Adversary(
                    config.adversarial,
                    steps=training.steps,
                    image_size=image_size,
                    micro_batch=training.at_once,
                    dino=Dino() if config.adversarial.kind == "dino" else None,
                    device=META,
                )

    @property
    def networks(self) -> list[nn.Module]:
        """Return the networks that there are."""
        found: list[nn.Module] = [] if self.lpips is None else [self.lpips]
        return found if self.adversary is None else [*found, self.adversary.discriminator]

    def loss(self, fakes: Tensor, reals: Tensor) -> Tensor:
        """Compute the loss of reconstructions, and the gradients of the discriminator."""
        loss = F.mse_loss(fakes, reals)
        if self.lpips is not None:
            loss = loss + self.lpips(fakes, reals).mean()
        if self.adversary is not None:
            loss = loss + self.adversary.generator_loss(fakes, torch.Generator())
            discriminator_loss, _ = self.adversary.discriminator_loss(reals, fakes, torch.Generator())
            backward(discriminator_loss)
        return loss


def _need(made: _Pass, training: TrainingConfig, image_size: int, ranks: int, fused_attention: bool) -> MemoryNeed:
    """Add up what the networks hold, and what the pass of a micro-batch adds."""
    set_up(list(made.networks), training.model_copy(update={"compile": False}))
    parameters = [p for network in made.networks for p in network.parameters()]
    trained = [p for p in parameters if p.requires_grad]
    buffers = [buffer for network in made.networks for buffer in network.buffers()]
    has_gradients = Spread(ranks).has_gradients(training.micro_batches)
    if has_gradients:
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
    gradients = [p.grad for p in trained if p.grad is not None]
    images = torch.empty(training.at_once, 3, image_size, image_size, device=META)
    given = [*parameters, *buffers, *gradients, images]
    (peak,) = peak_bytes(lambda: made.work(images), given=given, fused_attention=fused_attention)
    first = sum(p.numel() for p in made.networks[0].parameters() if p.requires_grad)
    trained_count = sum(p.numel() for p in trained)
    frozen = sum(p.numel() for p in parameters) - trained_count
    need = _both(
        held(Parameters(first, frozen=frozen), training, Spread(ranks)),
        held(Parameters(trained_count - first), training, Spread(ranks), keeps_best=False),
    )
    held_out = -(-VALIDATION_IMAGES // ranks)
    pixels = FLOAT * 3 * image_size**2
    activations = peak if has_gradients else max(peak - need.gradients, 0)
    return need._replace(activations=activations, inputs=pixels * (held_out + 2 * training.at_once))


def _both(one: MemoryNeed, other: MemoryNeed) -> MemoryNeed:
    return MemoryNeed(*(a + b for a, b in zip(one, other, strict=True)))
