"""A step of distribution alignment of SFTok-B: with the teacher's codes and without, compiled, beside the published."""

import functools
import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from infra.learner import Learner, Plan
from infra.ranks import ALONE
from infra.schedule import OptimizerConfig, TrainingConfig
from sftok.config import AlignmentStageConfig
from sftok.decoder import random_mask
from sftok.proxy import Teacher
from sftok.train import set_up
from sftok.train_alignment import alignment_losses
from tests.benchmarks.device import subjects
from tests.benchmarks.device.bench import Bench, operations
from tests.benchmarks.published import Published, average

BATCH, QUICK_BATCH = 128, 4
OPTIMIZER = OptimizerConfig(warmup_steps=0)
STEPS = 1000  # of the schedule


def run(bench: Bench) -> None:
    """bf16, whose share is of the arithmetic of teacher, guide, forward and backward pass."""
    teacher, batch = subjects.teacher(bench), QUICK_BATCH if bench.is_quick else BATCH
    images = subjects.images(bench, batch)
    step = our_step(bench, teacher, images[:1], is_compiled=False)
    student = operations(functools.partial(step, teacher.encode(images[:1])))
    codes = operations(lambda: teacher.encode(images[:1]))
    bench.put("arithmetic of an image", (student + codes) / 1e9, "GFLOP", note=f"{codes / 1e9:.1f} of it the teacher's")
    proxy_BP = teacher.encode(images)
    measure = functools.partial(bench.race, items=batch, unit="images/s", rounds=4)
    measure(f"teacher's codes, batch {batch}", {"ours": lambda: teacher.encode(images)}, flops=codes)
    for name, is_compiled in (("eager", False), ("compiled", True)):
        ours = our_step(bench, teacher, images, is_compiled=is_compiled)
        theirs = {} if is_compiled else {"published": published_step(bench, teacher, images)}
        title = f"{name}, batch {batch}"
        measure(f"{title}, with the teacher", {**theirs, "ours": ours}, flops=student + codes)
        measure(f"{title}, without", {"ours": functools.partial(ours, proxy_BP)}, flops=student)
        bench.note_memory(f"{title}: memory at the peak")
        bench.clear()


def our_step(bench: Bench, teacher: Teacher, images: Tensor, *, is_compiled: bool) -> Callable[..., None]:
    """As the stage does it; given the teacher's codes, it does not ask for them."""
    model = subjects.tokenizer(bench, pixels=False).requires_grad_(True).train()
    training = TrainingConfig(
        steps=STEPS, batch_size=len(images), optimizer=OPTIMIZER, precision="bf16", compile=is_compiled
    )
    set_up([model.encoder, model.decoder], training)
    config = AlignmentStageConfig(training=training, replacement="self_forcing")
    learner, steps = Learner(model.named_parameters(), Plan.of(training, ALONE)), itertools.count()

    def step(proxy_BP: Tensor | None = None) -> None:
        wanted_BP = teacher.encode(images) if proxy_BP is None else proxy_BP
        generator = torch.Generator().manual_seed(0)
        learner.backward(alignment_losses(model, wanted_BP, images, config, generator)["loss"])
        learner.update(next(steps))

    return step


def published_step(bench: Bench, teacher: Teacher, images: Tensor) -> Callable[[], object]:
    """As the published code does it: images encoded twice, the guide outside autocast, plain AdamW, EMA one by one."""
    published = Published(subjects.tokenizer(bench, pixels=False)).requires_grad_(True).to(bench.device)
    optimizer = torch.optim.AdamW(published.parameters(), lr=OPTIMIZER.lr, betas=OPTIMIZER.betas)
    shadow = {name: parameter.detach().clone() for name, parameter in published.named_parameters()}
    update = average(shadow, published, OPTIMIZER.ema_decay)
    hidden_BP = random_mask(teacher.encode(images[:1]).expand(len(images), -1).shape, torch.Generator().manual_seed(0))
    hidden_BP = hidden_BP.to(bench.device)

    def step() -> None:
        published.alignment_step(teacher, images, hidden_BP, optimizer, bf16=True)
        update()

    return step
