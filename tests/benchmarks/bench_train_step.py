"""A step of distribution alignment with 10.6 M parameters on 64 px images, batch 32, beside the published way."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from infra.compute.ranks import ALONE
from infra.config import Precision
from infra.training.config import OptimizerConfig, TrainingConfig
from infra.training.learner import Learner, OptimizerPlan
from sftok.config import AlignmentStageConfig, TeacherConfig
from sftok.model.decoder import random_mask
from sftok.model.teacher import Teacher
from sftok.training.alignment import alignment_losses
from tests.benchmarks import machine, models
from tests.benchmarks.published import PublishedTokenizer, average
from tests.benchmarks.table import seconds, show, times

BATCH, ROUNDS = 32, 3
OPTIMIZER = OptimizerConfig(warmup_steps=0)


def main() -> None:
    torch.set_num_threads(machine.THREADS)
    torch.manual_seed(0)
    teacher = Teacher(TeacherConfig()).eval().requires_grad_(False)
    images = models.pictures(BATCH, models.SMALL_SIZE)
    ways: dict[str, Callable[[], object]] = {}
    for precision in ("fp32", "bf16"):
        ways[f"ours {precision}"] = our_step(teacher, images, precision)
        ways[f"published {precision}"] = published_step(teacher, images, precision)
    ways["teacher's codes alone (in each of the above)"] = lambda: teacher.encode(images)
    taken = seconds(ways, rounds=ROUNDS)
    rows = []
    for name, t in taken.items():
        reference = taken["published bf16" if name.endswith("bf16") else "published fp32"]
        ratio = times(reference / t) if name.startswith(("ours", "published")) else ""
        rows.append([name, f"{1000 * t:.0f}", f"{BATCH / t:.1f}", ratio])
    columns = ["SFTok of 10.6 M, 64 px, batch 32", "ms a step", "img/s", "of published"]
    show("training step of the alignment stage: teacher, guide, forward, backward, AdamW, EMA", columns, rows)


def our_step(teacher: Teacher, images: Tensor, precision: Precision) -> Callable[[], object]:
    """As the alignment stage does it."""
    model = models.small_tokenizer()
    training = TrainingConfig(steps=1000, batch_size=BATCH, optimizer=OPTIMIZER, precision=precision)
    config = AlignmentStageConfig(training=training, replacement="self_forcing")
    learner, steps = Learner(model, OptimizerPlan.of(training, ALONE)), itertools.count()

    def step() -> None:
        generator = torch.Generator().manual_seed(0)
        learner.backward(
            alignment_losses(model, teacher.encode(images), images, config=config, generator=generator)["loss"]
        )
        learner.update(next(steps))

    return step


def published_step(teacher: Teacher, images: Tensor, precision: Precision) -> Callable[[], object]:
    """As the published code does it: the guide encodes by itself and outside autocast, plain AdamW, EMA one by one."""
    published = PublishedTokenizer(models.small_tokenizer())
    optimizer = torch.optim.AdamW(published.parameters(), lr=OPTIMIZER.lr, betas=OPTIMIZER.betas)
    shadow = {name: parameter.detach().clone() for name, parameter in published.named_parameters()}
    update = average(shadow, published, OPTIMIZER.ema_decay)

    def step() -> None:
        hidden = random_mask(torch.Size([BATCH, 16]), torch.Generator().manual_seed(0))
        published.alignment_step(teacher, images, hidden, optimizer, bf16=precision == "bf16")
        update()

    return step


if __name__ == "__main__":
    main()
