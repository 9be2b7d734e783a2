"""A generator's training step, B at batch 512 and XL at 128, beside the barest loop around the same network."""

import functools

import torch

from generator.config import GENERATORS
from generator.flops import training_flops
from tests.benchmarks.bench_generator_train import bare_step, network, our_step
from tests.benchmarks.device.bench import Bench
from tests.benchmarks.device.sample import SPACE, TOY_SPACE

BATCHES = {"B": 512, "XL": 128}
COMPILED = "B"  # compiling the other one takes the section's time


def run(bench: Bench) -> None:
    """bf16."""
    for size, batch in {"toy": 16}.items() if bench.is_quick else BATCHES.items():
        config, space = GENERATORS[size], TOY_SPACE if bench.is_quick else SPACE
        classes = torch.randint(space.num_classes, (batch,)).to(bench.device)
        codes = torch.randint(space.codebook_size, (batch, space.num_tokens)).to(bench.device)
        fresh = functools.partial(network, config, space, bench.device.type)
        measure = functools.partial(
            bench.race,
            items=batch * space.num_tokens,
            unit="tokens/s",
            flops=training_flops(config, space) / space.num_tokens,
        )
        ways = {"bare loop": bare_step(fresh(), classes, codes, "bf16"), "ours": our_step(fresh(), batch, "bf16")}
        measure(f"{size}, batch {batch}", ways)
        bench.note_memory(f"{size}, batch {batch}: memory at the peak, both")
        ways.clear()
        bench.clear()
        if bench.is_quick or size == COMPILED:
            measure(f"{size}, batch {batch}, compiled", {"ours": our_step(fresh(), batch, "bf16", is_compiled=True)})
            bench.clear()
