"""A generator's training step beside the barest loop around the same network: tokens/s.

Ours is what training does with a batch: loss, checks that all is finite, clipping, optimizer, averaged weights. The
bare loop is forward, cross-entropy, backward, clipping and PyTorch's fused AdamW, without the average.
"""

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generator.config import GENERATORS, GeneratorConfig
from generator.model import CodeSpace, Generator
from generator.objectives import training_loss
from infra.learner import Learner, Plan
from infra.schedule import OptimizerConfig, Precision
from infra.training import autocast
from tests.benchmarks import machine
from tests.benchmarks.table import seconds, show, times

OPTIMIZER = OptimizerConfig(warmup_steps=0)
TOY_SPACE, SPACE = CodeSpace(256, 16, 10), CodeSpace(8192, 64, 1000)
SUBJECTS: list[tuple[str, GeneratorConfig, CodeSpace, int, Precision, int]] = [
    ("toy, 16 codes, batch 128, fp32", GENERATORS["toy"], TOY_SPACE, 128, "fp32", 25),
    ("toy, 16 codes, batch 128, bf16", GENERATORS["toy"], TOY_SPACE, 128, "bf16", 25),
    ("B, 64 codes, batch 16, bf16", GENERATORS["B"], SPACE, 16, "bf16", 3),
]


def main() -> None:
    torch.set_num_threads(machine.THREADS)
    rows = []
    for name, config, space, batch, precision, rounds in SUBJECTS:
        classes = torch.randint(space.num_classes, (batch,))
        codes = torch.randint(space.codebook_size, (batch, space.num_tokens))
        ways = {
            "ours": our_step(network(config, space), classes, codes, precision),
            "bare": bare_step(network(config, space), classes, codes, precision),
        }
        taken = seconds(ways, rounds=rounds)
        ours, bare = (codes.numel() / taken[way] for way in ("ours", "bare"))
        rows.append([name, f"{ours:.0f}", f"{bare:.0f}", times(ours / bare)])
    show("training step of the generator", ["", "tokens/s", "bare loop", "ratio"], rows)


def network(config: GeneratorConfig, space: CodeSpace) -> Generator:
    torch.manual_seed(0)
    model = Generator(config, space)
    model.initialise()
    return model.train()


def our_step(model: Generator, classes: Tensor, codes: Tensor, precision: Precision) -> Callable[[], object]:
    """As training does it."""
    learner, steps = Learner(model.named_parameters(), Plan(OPTIMIZER, steps=1000)), itertools.count()

    def step() -> None:
        with autocast(precision, "cpu"):
            loss = training_loss(model, classes, codes, None, label_smoothing=0.0)
        learner.backward(loss)
        learner.update(next(steps))

    return step


def bare_step(model: Generator, classes: Tensor, codes: Tensor, precision: Precision) -> Callable[[], object]:
    """As little as trains it."""
    optimizer = torch.optim.AdamW(model.parameters(), OPTIMIZER.lr, fused=True)

    def step() -> None:
        with autocast(precision, "cpu"):
            logits = model(classes, codes)
        F.cross_entropy(logits.float().flatten(0, 1), codes.flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    main()
