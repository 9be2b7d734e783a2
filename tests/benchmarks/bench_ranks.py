"""A generator's training step by 1, 2 and 4 ranks beside the ideal, and what the ranks send each other.

All ranks together take the same steps on the same batch; the ideal is the step of one rank divided by the number of
ranks, or of cores where those are fewer. Volume and overlap are read from a trace of the first rank: the bytes of each
collective's tensors (a ring sends up to twice as many), and the share of the collectives' time that falls into the
backward pass. Ranks are on one machine: over a network, sums take longer.
"""

import os
import time
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from generator.code_space import CodeSpace
from generator.config import GENERATORS, GeneratorTrainingConfig
from generator.data import CodeData
from generator.kinds import build_generator
from generator.train import shard_if_large, training_step
from infra.compute.cluster import session
from infra.compute.ranks import Ranks, run_ranks
from infra.progress import Progress
from infra.store.store import Store
from infra.training.config import OptimizerConfig
from infra.training.learner import Learner, OptimizerPlan
from infra.training.loop import TrainingRun
from tests.benchmarks.table import percent, show, times

SPACE = CodeSpace(8192, 64, 1000)
BATCH, STEPS = 16, 6
RANKS = (1, 2, 4)
WAYS = ("ddp", "fsdp")


class Measured(NamedTuple):
    """What the first rank saw."""

    seconds: float
    """the shortest step."""
    sent: int
    """bytes of the tensors of all collectives in a step."""
    overlap: float
    """share of the collectives' time within the backward pass."""


def main() -> None:
    with session(num_cpus=max(RANKS)):
        for preset in ("small", "B"):
            rows = []
            alone = run_ranks(partial(measure, preset, "ddp"), 1)
            for count in RANKS[1:]:
                ideal = alone.seconds / min(count, os.cpu_count() or 1)
                for way in WAYS:
                    shared = run_ranks(partial(measure, preset, way), count)
                    row = [f"{count} ranks, {way}", f"{1000 * shared.seconds:.0f}", times(shared.seconds / ideal)]
                    rows.append([*row, f"{shared.sent / 1e6:.1f}", percent(shared.overlap)])
            title = f"generator {preset}, batch {BATCH}, fp32; one rank takes {1000 * alone.seconds:.0f} ms a step"
            show(title, ["", "ms", "of the ideal", "MB sent", "during backward"], rows)


def measure(preset: str, way: str, ranks: Ranks, progress: Progress) -> Measured:
    del progress
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = build_generator(GENERATORS[preset], SPACE)
    network.initialise()
    optimizer = OptimizerConfig(warmup_steps=0)
    values = {"steps": 100, "batch_size": BATCH, "micro_batch": BATCH // max(RANKS), "parallel": way}
    config = GeneratorTrainingConfig.model_validate({**values, "optimizer": optimizer})
    run = TrainingRun(Store("."), seed=0, ranks=ranks)  # nothing is written
    if ranks.size > 1:
        shard_if_large(network, config, run)
    learner = Learner(network, OptimizerPlan.of(config, ranks))
    classes = torch.randint(SPACE.num_classes, (BATCH,), dtype=torch.int32)
    codes = torch.randint(SPACE.codebook_size, (BATCH, SPACE.num_tokens), dtype=torch.int16)
    step = training_step(network, learner, CodeData(classes, codes), config, run)
    taken = []
    for number in range(STEPS):
        ranks.wait()
        started = time.perf_counter()
        step(number)
        ranks.wait()
        taken.append(time.perf_counter() - started)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as traced:
        step(STEPS)
    return Measured(min(taken[1:]), *volume(traced.events() or ()))


def volume(events: Iterable[Any]) -> tuple[int, float]:
    """Read from a trace the bytes that collectives of float32 had, and the share of their time within backward."""
    backward, spans, elements = [], [], 0
    for event in events:
        place = event.time_range.start, event.time_range.end
        if "evaluate_function" in event.name:
            backward.append(place)
        elif event.name.startswith(("gloo:", "nccl:")):
            spans.append(place)
            elements += sum(torch.Size(shape).numel() for shape in event.input_shapes)
    inside = sum(overlap(span, place) for span in merged(spans) for place in merged(backward))
    whole = sum(end - start for start, end in merged(spans))
    return 4 * elements, inside / whole if whole else 0.0


def merged(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Join spans that touch."""
    joined: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return joined


def overlap(one: tuple[float, float], other: tuple[float, float]) -> float:
    return max(0.0, min(one[1], other[1]) - max(one[0], other[0]))


if __name__ == "__main__":
    main()
