"""A step of distribution alignment of SFTok-B: with the teacher's codes and without, compiled, beside the published."""

import functools
import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from infra.compute.device import use_numerics
from infra.compute.ranks import ALONE
from infra.config import Precision
from infra.training.config import OptimizerConfig, TrainingConfig
from infra.training.learner import Learner, OptimizerPlan
from sftok.config import AlignmentStageConfig
from sftok.model.decoder import random_mask
from sftok.model.teacher import Teacher
from sftok.training.alignment import alignment_losses, teacher_codes
from sftok.training.common import set_up
from tests.benchmarks.device import models
from tests.benchmarks.device.bench import TRAINED, Bench, operations
from tests.benchmarks.published import PublishedTokenizer, average

BATCH, QUICK_BATCH = 128, 4
OPTIMIZER = OptimizerConfig(warmup_steps=0)
STEPS = 1000  # of the schedule


def run(bench: Bench) -> None:
    """bf16, whose share is of the arithmetic of teacher, guide, forward and backward pass."""
    teacher, batch = models.teacher(bench), QUICK_BATCH if bench.is_quick else BATCH
    images = models.images(bench, batch)
    codes = operations(lambda: teacher.encode(images[:1]))
    student = operations(functools.partial(our_step(bench, images[:1], is_compiled=False), teacher.encode(images[:1])))
    bench.put("arithmetic of an image", (student + codes) / 1e9, "GFLOP", note=f"{codes / 1e9:.1f} of it the teacher's")
    measure = functools.partial(bench.race, items=batch, unit="images/s", rounds=4)
    proxy_BP = teacher.encode(images)
    for name, is_compiled in (("eager, IEEE", False), ("compiled, TF32", True)):
        theirs = {} if is_compiled else {"published": published_step(bench, teacher, images)}
        if is_compiled:
            use_numerics(TRAINED, bench.device.type)
            teacher = compiled_teacher(teacher, images)
        ours, asked = (
            our_step(bench, images, is_compiled=is_compiled),
            functools.partial(teacher_codes, teacher, images),
        )
        ways = {
            "ours": lambda ours=ours, asked=asked: ours(asked(stage(batch, "fp32"))),
            "ours, teacher in bf16": lambda ours=ours, asked=asked: ours(asked(stage(batch, "bf16"))),
        }
        alone = {f"ours in {p}": functools.partial(asked, stage(batch, p)) for p in ("fp32", "bf16")}
        measure(f"{name}: the teacher's codes, batch {batch}", alone, flops=codes)
        measure(f"{name}: with the teacher", theirs | ways, flops=student + codes)
        measure(f"{name}: without", {"ours": functools.partial(ours, proxy_BP)}, flops=student)
        bench.note_memory(f"{name}: memory at the peak")
        bench.clear()


def stage(batch: int, teacher_precision: Precision, *, is_compiled: bool = False) -> AlignmentStageConfig:
    training = TrainingConfig(steps=STEPS, batch_size=batch, optimizer=OPTIMIZER, precision="bf16", compile=is_compiled)
    return AlignmentStageConfig(training=training, replacement="self_forcing", teacher_precision=teacher_precision)


def compiled_teacher(teacher: Teacher, images: Tensor) -> Teacher:
    """Compiled in place as the stage does it on CUDA."""
    config = stage(len(images), "fp32", is_compiled=True)
    set_up([teacher.encoder.to(memory_format=torch.channels_last)], config.training)
    return teacher


def our_step(bench: Bench, images: Tensor, *, is_compiled: bool) -> Callable[[Tensor], None]:
    """As the stage does it, from the teacher's codes."""
    model = models.tokenizer(bench, pixels=False).requires_grad_(True).train()
    config = stage(len(images), "fp32", is_compiled=is_compiled)
    set_up([model.encoder, model.decoder], config.training)
    learner, steps = Learner(model, OptimizerPlan.of(config.training, ALONE)), itertools.count()

    def step(proxy_BP: Tensor) -> None:
        learner.backward(
            alignment_losses(model, proxy_BP, images, config=config, generator=torch.Generator().manual_seed(0))["loss"]
        )
        learner.update(next(steps))

    return step


def published_step(bench: Bench, teacher: Teacher, images: Tensor) -> Callable[[], object]:
    """As the published code does it: images encoded twice, the guide outside autocast, plain AdamW, EMA one by one."""
    published = PublishedTokenizer(models.tokenizer(bench, pixels=False)).requires_grad_(True).to(bench.device)
    optimizer = torch.optim.AdamW(published.parameters(), lr=OPTIMIZER.lr, betas=OPTIMIZER.betas)
    shadow = {name: parameter.detach().clone() for name, parameter in published.named_parameters()}
    update = average(shadow, published, OPTIMIZER.ema_decay)
    hidden_BP = random_mask(teacher.encode(images[:1]).expand(len(images), -1).shape, torch.Generator().manual_seed(0))
    hidden_BP = hidden_BP.to(bench.device)

    def step() -> None:
        published.alignment_step(teacher, images, hidden_BP, optimizer, bf16=True)
        update()

    return step
