"""A generator's training step beside the barest loop around the same network: tokens/s and utilisation.

Ours is the step that training does: rows drawn, labels dropped, seeds, loss, checks that all is finite, clipping,
optimizer, averaged weights. The bare loop is forward, cross-entropy, backward, clipping and PyTorch's fused AdamW, of
one batch that stays the same. Utilisation is the model's arithmetic beside a large `torch.mm` of the same type.
"""

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generator.autoregressive import Generator
from generator.code_space import CodeSpace
from generator.config import GENERATORS, GeneratorConfig, GeneratorTrainingConfig
from generator.data import CodeData
from generator.flops import training_flops
from generator.train import training_step
from infra.compute.compiler import compile_in_place
from infra.config import Precision
from infra.store.store import Store
from infra.training.config import OptimizerConfig
from infra.training.learner import Learner, OptimizerPlan
from infra.training.loop import TrainingRun, autocast
from tests.benchmarks import machine
from tests.benchmarks.table import percent, seconds, show, times

ROWS = 10_000
OPTIMIZER = OptimizerConfig(warmup_steps=0)
TOY_SPACE, SPACE = CodeSpace(256, 16, 10), CodeSpace(8192, 64, 1000)
CASES: list[tuple[str, GeneratorConfig, CodeSpace, int, Precision, int]] = [
    ("toy, 16 codes, batch 128, fp32", GENERATORS["toy"], TOY_SPACE, 128, "fp32", 25),
    ("toy, 16 codes, batch 128, bf16", GENERATORS["toy"], TOY_SPACE, 128, "bf16", 25),
    ("B, 64 codes, batch 16, bf16", GENERATORS["B"], SPACE, 16, "bf16", 8),
]


def main() -> None:
    torch.set_num_threads(machine.THREADS)
    rows, products = [], machine.products()
    for name, config, space, batch, precision, rounds in CASES:
        classes = torch.randint(space.num_classes, (batch,))
        codes = torch.randint(space.codebook_size, (batch, space.num_tokens))
        ways = {
            "ours": our_step(network(config, space), batch, precision),
            "bare": bare_step(network(config, space), classes, codes, precision),
        }
        limits = {way: product for way, product in products.items() if way.startswith(precision)}
        taken = seconds(ways | limits, rounds=rounds)
        ours, bare = (codes.numel() / taken[way] for way in ("ours", "bare"))
        peak = machine.peak(precision, taken).plain * 1e9
        used = [percent(batch * training_flops(config, space) / taken[way] / peak) for way in ("ours", "bare")]
        rows.append([name, f"{ours:.0f}", f"{bare:.0f}", times(ours / bare), *used])
    columns = ["", "tokens/s", "bare loop", "ratio", "of torch.mm", "bare loop's"]
    show("training step of the generator", columns, rows)


def network(config: GeneratorConfig, space: CodeSpace, device: str = "cpu") -> Generator:
    torch.manual_seed(0)
    with torch.device(device):
        model = Generator(config, space)
        model.initialise()
    return model.train()


def our_step(model: Generator, batch: int, precision: Precision, *, is_compiled: bool = False) -> Callable[[], object]:
    """As training does it."""
    config = GeneratorTrainingConfig(steps=1000, batch_size=batch, precision=precision, optimizer=OPTIMIZER)
    if is_compiled:
        compile_in_place(model)
    classes = torch.randint(model.space.num_classes, (ROWS,), dtype=torch.int32)
    codes = torch.randint(model.space.codebook_size, (ROWS, model.space.num_tokens), dtype=torch.int16)
    run = TrainingRun(Store("."), seed=0, threads=machine.THREADS, device=model.device.type)  # nothing is written
    learner, steps = Learner(model, OptimizerPlan.of(config, run.ranks)), itertools.count()
    step = training_step(model, learner, CodeData(classes, codes), config, run)
    return lambda: step(next(steps))


def bare_step(model: Generator, classes: Tensor, codes: Tensor, precision: Precision) -> Callable[[], object]:
    """As little as trains it."""
    optimizer = torch.optim.AdamW(model.parameters(), OPTIMIZER.lr, fused=True)

    def step() -> None:
        with autocast(precision, model.device.type):
            logits = model(classes, codes)
        F.cross_entropy(logits.float().flatten(0, 1), codes.flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    main()
