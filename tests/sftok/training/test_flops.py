"""The formulas of the stages' operations, against PyTorch's counter of what a step really does."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from infra.artifacts.pretrained import PretrainedConfig
from infra.store.store import Store
from infra.training.loop import TrainingRun
from sftok.config import NO_ADVERSARY, AdversarialConfig, AlignmentStageConfig, FineTuneStageConfig, TeacherStageConfig
from sftok.model.teacher import Teacher
from sftok.training.alignment import alignment_losses
from sftok.training.fine_tune import fine_tune_pass, with_pixel_decoder
from sftok.training.flops import alignment_effort, fine_tune_effort, teacher_effort
from sftok.training.pixel_losses import PixelLosses
from tests.sftok.losses.test_discriminator import dino_file
from tests.support.tiny_tokenizer import SIZE, TEACHER, TOKENIZER, tokenizer, training

BATCH = 3
RUN = TrainingRun(Store("."), seed=0)
TRAINING = training(9, batch_size=BATCH)
PATCH = AdversarialConfig(weight=0.5, kind="patch", start_step=2, channels=4, layers=2)
DINO = AdversarialConfig(weight=0.5, kind="dino", start_step=2)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def lpips_file() -> bytes:
    import io

    from sftok.losses.perceptual import Lpips

    layers = {n.removeprefix("features."): t for n, t in Lpips().features.state_dict().items()}
    buffer = io.BytesIO()
    torch.save({f"features.{n}": torch.randn_like(t) * 0.05 for n, t in layers.items()}, buffer)
    return buffer.getvalue()


def weights(_: PretrainedConfig, what: str) -> bytes:
    return lpips_file() if "LPIPS" in what else dino_file()


def counted(step: object) -> int:
    assert callable(step)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # fused attention computes it twice
        step()
    return counter.get_total_flops()


@pytest.mark.parametrize("guide_steps", [1, 3])
@pytest.mark.parametrize("replacement", ["none", "self_forcing", "ground_truth"])
def test_an_alignment_step(replacement: str, guide_steps: int) -> None:
    # Sinkhorn's products with a vector are left out of the formula; the counter takes half of them for matrices'.
    config = AlignmentStageConfig(
        training=TRAINING, replacement=replacement, guide_steps=guide_steps, assignment="nearest"
    )
    model, teacher = tokenizer().train(), Teacher(TEACHER).requires_grad_(False)
    images = torch.rand(BATCH, 3, SIZE, SIZE)
    effort = alignment_effort(config, TOKENIZER, TEACHER, SIZE)
    found = counted(
        lambda: alignment_losses(model, teacher.encode(images), images, config=config, generator=seeded())[
            "loss"
        ].backward()
    )
    assert found == effort.flops == effort.flops_of(8)
    assert effort.items == {"images": BATCH}


@pytest.mark.parametrize("step", [0, 2])
@pytest.mark.parametrize(("size", "adversary"), [(SIZE, NO_ADVERSARY), (SIZE, PATCH), (32, DINO)])
def test_a_step_of_the_teacher(size: int, adversary: AdversarialConfig, step: int) -> None:
    config = TeacherStageConfig(model=TEACHER, training=TRAINING, perceptual_weight=1, adversarial=adversary)
    model, images = Teacher(TEACHER), torch.rand(BATCH, 3, size, size)
    pixels = PixelLosses.of(config, size, run=RUN, weights=weights)

    def work() -> None:
        out = model(images)
        loss = pixels.of_batch(out.images, images, step, 0)[0]
        (loss + out.latents.square().mean()).backward()

    assert counted(work) == teacher_effort(config, size).flops_of(step)


@pytest.mark.parametrize("step", [0, 2])
@pytest.mark.parametrize("adversary", [NO_ADVERSARY, PATCH])
def test_a_step_of_fine_tuning(adversary: AdversarialConfig, step: int) -> None:
    config = FineTuneStageConfig(
        training=TRAINING, perceptual_weight=1, adversarial=adversary, guide_steps=2, assignment="nearest"
    )
    model = with_pixel_decoder(tokenizer(), Teacher(TEACHER)).requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("decoder.", "pixel_")))
    images = torch.rand(BATCH, 3, SIZE, SIZE)
    pixels = PixelLosses.of(config, SIZE, run=RUN, weights=weights)

    def work() -> None:
        reconstruction = fine_tune_pass(model, images, config=config, masks=seeded())
        pixels.of_batch(reconstruction, images, step, 0)[0].backward()

    assert counted(work) == fine_tune_effort(config, TOKENIZER, TEACHER, SIZE).flops_of(step)
