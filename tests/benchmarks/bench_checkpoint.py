"""How long a checkpoint of generator B keeps its training, beside a blocking save and the machine's memory.

Saves go to a folder on this machine. "Blocking" is what earlier versions did: gather bytes, hash them, write, mark, and
only then go on. The copy is compared with one of a single flat tensor by as many threads. What the thread that writes
takes from the steps beside it is the time that these steps take longer; on CPUs they share the cores.
"""

import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from generator.code_space import CodeSpace
from generator.config import GENERATORS, GeneratorTrainingConfig
from generator.data import CodeData
from generator.train import training_step
from infra.store.store import Store
from infra.training.checkpoint import Checkpoints
from infra.training.config import OptimizerConfig
from infra.training.learner import Learner, OptimizerPlan
from infra.training.loop import TrainingRun
from tests.benchmarks import machine
from tests.benchmarks.bench_generator_train import network
from tests.benchmarks.table import percent, seconds, show

SPACE, BATCH, ROWS = CodeSpace(8192, 64, 1000), 4, 1000
ROUNDS, STEPS, EVERY = 3, 4, 500


def main() -> None:
    torch.set_num_threads(machine.THREADS)
    model = network(GENERATORS["B"], SPACE)
    config = GeneratorTrainingConfig(
        steps=1000, batch_size=BATCH, precision="bf16", optimizer=OptimizerConfig(warmup_steps=0)
    )
    learner = Learner(model, OptimizerPlan.of(config, TrainingRun(Store("."), 0).ranks))
    classes = torch.randint(SPACE.num_classes, (ROWS,), dtype=torch.int32)
    codes = torch.randint(SPACE.codebook_size, (ROWS, SPACE.num_tokens), dtype=torch.int16)
    run = TrainingRun(Store("."), seed=0, threads=machine.THREADS)  # nothing is written there
    step = training_step(model, learner, CodeData(classes, codes), config, run)
    step(0)
    with tempfile.TemporaryDirectory() as folder:
        measure_saves(learner.tensors(), Path(folder))
        measure_steps(step, learner, Path(folder))


def measure_saves(tensors: dict[str, Tensor], folder: Path) -> None:
    """Show how long a save stops the training."""
    size = sum(tensor.nbytes for tensor in tensors.values())
    checkpoints, steps = Checkpoints(Store(folder / "new")), iter(range(1, 100))
    flat, there = torch.ones(size, dtype=torch.uint8), torch.ones(size, dtype=torch.uint8)
    began = time.perf_counter()
    checkpoints.save(next(steps), tensors, {})
    first = time.perf_counter() - began
    stops, wholes = [], []
    for _ in range(ROUNDS):
        checkpoints.wait()
        began = time.perf_counter()
        checkpoints.save(next(steps), tensors, {})
        stops.append(time.perf_counter() - began)
        checkpoints.wait()
        wholes.append(time.perf_counter() - began)
    others = {
        "blocking": lambda: save_blocking(tensors, Store(folder / "old")),
        "copy": lambda: there.copy_(flat),
    }
    taken = seconds(others, rounds=ROUNDS)
    found = {
        "blocking save, as before": taken["blocking"],
        "first save: copy into new memory": first,
        "a later save: copy": min(stops),
        "until its marker is written, in a thread": min(wholes),
        "copy of one flat tensor": taken["copy"],
    }
    rows = [[n, f"{t:.2f}", f"{size / t / 1e9:.1f}", percent(taken["copy"] / t)] for n, t in found.items()]
    parameters = sum(tensor.numel() for name, tensor in tensors.items() if name.startswith("weight."))
    title = f"save of {parameters / 1e6:.0f} M parameters with EMA and moments, {size / 1e9:.2f} GB"
    show(title, ["", "s", "GB/s", "of a copy's"], rows)


def save_blocking(tensors: dict[str, Tensor], folder: Store) -> None:
    """As earlier versions did."""
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    sha256 = hashlib.sha256(data).hexdigest()
    folder.write(f"{sha256[:16]}.safetensors", data)
    folder.write("checkpoint.json", b"{}")


def measure_steps(step: Callable[[int], object], learner: Learner, folder: Path) -> None:
    """Show what share of the time checkpoints cost in all."""
    alone, stops, slower = [], [], []
    with Checkpoints(Store(folder / "steps")) as checkpoints:
        checkpoints.save(1, learner.tensors(), {})
        for round_ in range(ROUNDS):
            checkpoints.wait()
            usual = [timed(step, index) for index in range(STEPS)]
            alone += usual
            began = time.perf_counter()
            checkpoints.save(round_ + 2, learner.tensors(), {})
            stops.append(time.perf_counter() - began)
            writing = checkpoints._writing
            assert writing is not None
            beside = []
            while not writing.done():
                beside.append(timed(step, 0))
            slower.append(sum(beside) - len(beside) * statistics.median(usual))
    usual_step, stop, slow = (statistics.median(times) for times in (alone, stops, slower))
    cost = (stop + slow) / (EVERY * usual_step + stop + slow)
    rows = [
        ["a step", f"{usual_step:.2f}", ""],
        ["stopped by a save", f"{stop:.2f}", percent(stop / (EVERY * usual_step))],
        ["steps beside the write take longer by, in all", f"{slow:.2f}", percent(slow / (EVERY * usual_step))],
        ["a checkpoint", f"{stop + slow:.2f}", percent(cost)],
    ]
    title = f"training of generator B, batch {BATCH}, bf16, with a checkpoint every {EVERY} steps"
    show(title, ["", "s", "of the time"], rows)


def timed(step: Callable[[int], object], index: int) -> float:
    began = time.perf_counter()
    step(index)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
