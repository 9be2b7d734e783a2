"""A step of fine-tuning SFTok-B towards pixels with LPIPS and a DINO discriminator, all of random weights."""

import functools
import io
import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infra.compute.device import use_numerics
from infra.compute.ranks import ALONE
from infra.store.store import Store
from infra.training.config import OptimizerConfig, TrainingConfig
from infra.training.learner import Learner, OptimizerPlan
from infra.training.loop import TrainingRun
from sftok.config import AdversarialConfig, FineTuneStageConfig
from sftok.losses.adversarial import Adversary
from sftok.losses.dino import Dino
from sftok.losses.perceptual import Lpips
from sftok.model.tokenizer import SFTok
from sftok.training.common import set_up
from sftok.training.fine_tune import fine_tune_pass
from sftok.training.pixel_losses import PixelLosses
from tests.benchmarks.device import models
from tests.benchmarks.device.bench import TRAINED, Bench, operations

BATCH, QUICK_BATCH = 32, 4
OPTIMIZER = OptimizerConfig(warmup_steps=0)
STEPS = 1000  # of the schedule
Masks = torch.Generator


def run(bench: Bench) -> None:
    """bf16, beside a bare loop of the same pass and losses with PyTorch's fused AdamW, but without a discriminator."""
    batch = QUICK_BATCH if bench.is_quick else BATCH
    images = models.images(bench, batch)
    size = images.shape[-1]
    # Counted without the adversary's share of a virtual batch, which no batch of one has.
    flops = operations(our_step(bench, images, size, is_compiled=False)) / batch
    bench.put("arithmetic of an image", flops / 1e9, "GFLOP")
    bench.clear()
    measure = functools.partial(bench.race, items=batch, unit="images/s", rounds=4)
    measure(f"eager, IEEE, batch {batch}", {"bare loop, no discriminator": bare_step(bench, images)})
    bench.clear()
    for name, is_compiled in (("eager, IEEE", False), ("compiled, TF32", True)):
        if is_compiled:
            use_numerics(TRAINED, bench.device.type)
        ways = {"ours": our_step(bench, images, size, is_compiled=is_compiled)}
        measure(f"{name}, batch {batch}", ways, flops=flops)
        bench.note_memory(f"{name}, batch {batch}: memory at the peak")
        ways.clear()
        bench.clear()


def trained_parts(bench: Bench) -> tuple[SFTok, list[tuple[str, nn.Parameter]]]:
    """The tokenizer, and what fine-tuning trains of it."""
    model = models.tokenizer(bench)
    assert model.pixel_decoder is not None
    model.pixel_decoder.to(memory_format=torch.channels_last)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("decoder.", "pixel_")))
    return model, [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def stage(batch: int, *, is_compiled: bool) -> FineTuneStageConfig:
    training = TrainingConfig(steps=STEPS, batch_size=batch, optimizer=OPTIMIZER, precision="bf16", compile=is_compiled)
    adversarial = AdversarialConfig(weight=0.5, start_step=0, optimizer=OPTIMIZER)
    return FineTuneStageConfig(training=training, perceptual_weight=1.0, adversarial=adversarial)


def our_step(bench: Bench, images: Tensor, size: int, *, is_compiled: bool) -> Callable[[], object]:
    """As the stage does it."""
    config = stage(len(images), is_compiled=is_compiled)
    model, _ = trained_parts(bench)
    assert model.pixel_decoder is not None
    set_up([model.encoder, model.decoder, model.pixel_decoder], config.training)
    learner, steps = Learner(model, OptimizerPlan.of(config.training, ALONE)), itertools.count()
    adversary = Adversary(
        config.adversarial, steps=STEPS, image_size=size, micro_batch=len(images), dino=dino_file(), device=bench.device
    )
    run = TrainingRun(Store("."), seed=0, device=bench.device.type)  # nothing is written
    pixels = PixelLosses(config, run=run, lpips=lpips(bench.device), adversary=adversary)

    def step() -> None:
        number = next(steps)
        reconstruction = fine_tune_pass(model, images, config=config, masks=Masks().manual_seed(number))
        loss, _ = pixels.of_batch(reconstruction, images, number, 0)
        learner.backward(loss)
        learner.update(number)
        pixels.update(number)

    return step


def bare_step(bench: Bench, images: Tensor) -> Callable[[], object]:
    """As little as trains the same network towards pixels."""
    config, (model, trained) = stage(len(images), is_compiled=False), trained_parts(bench)
    parameters, perceptual = [parameter for _, parameter in trained], lpips(bench.device)
    optimizer = torch.optim.AdamW(parameters, OPTIMIZER.lr, fused=True)

    def step() -> None:
        reconstruction = fine_tune_pass(model, images, config=config, masks=Masks().manual_seed(0))
        (F.mse_loss(reconstruction, images) + perceptual(reconstruction, images).mean()).backward()
        nn.utils.clip_grad_norm_(parameters, OPTIMIZER.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


@functools.cache
def lpips(device: torch.device) -> Lpips:
    """LPIPS of random weights, which no step changes."""
    torch.manual_seed(0)
    return Lpips().to(device, memory_format=torch.channels_last)


@functools.cache
def dino_file() -> bytes:
    """DINO of random weights, as a file."""
    torch.manual_seed(0)
    file = io.BytesIO()
    torch.save(Dino().state_dict(), file)
    return file.getvalue()
