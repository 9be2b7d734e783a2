"""How long a checkpoint of generator B keeps its training, beside a blocking save and the machine's memory.

Saves go to a folder on this machine. "Blocking" is what earlier versions did: gather the bytes, hash them, write, mark,
and only then go on. The copy is compared with one of a single flat tensor by as many threads. On CPUs the thread that
writes takes time from the steps beside it: it is compared with a step by the processor time of both.
"""

import hashlib
import tempfile
import time
from collections.abc import Callable
from functools import partial
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
from tests.benchmarks.table import percent, seconds, show, times

SPACE, BATCH, ROWS = CodeSpace(8192, 64, 1000), 16, 1000
ROUNDS, STEPS, EVERY = 5, 3, 500


def main() -> None:
    torch.set_num_threads(machine.THREADS)
    model = network(GENERATORS["B"], SPACE)
    optimizer = OptimizerConfig(warmup_steps=0)
    config = GeneratorTrainingConfig(steps=1000, batch_size=BATCH, precision="bf16", optimizer=optimizer)
    run = TrainingRun(Store("."), seed=0, threads=machine.THREADS)  # nothing is written there
    learner = Learner(model, OptimizerPlan.of(config, run.ranks))
    classes = torch.randint(SPACE.num_classes, (ROWS,), dtype=torch.int32)
    codes = torch.randint(SPACE.codebook_size, (ROWS, SPACE.num_tokens), dtype=torch.int16)
    step = training_step(model, learner, CodeData(classes, codes), config, run)
    step(0)
    with tempfile.TemporaryDirectory() as folder, Checkpoints(Store(folder)) as checkpoints:
        measure_stop(learner.tensors(), checkpoints, Path(folder))
        measure_share(step, learner, checkpoints)


def measure_stop(tensors: dict[str, Tensor], checkpoints: Checkpoints, folder: Path) -> None:
    """Show how long a save stops the training."""
    size, numbers = sum(tensor.nbytes for tensor in tensors.values()), iter(range(1, 100))
    flat, there = torch.ones(size, dtype=torch.uint8), torch.ones(size, dtype=torch.uint8)
    began = time.perf_counter()
    checkpoints.save(next(numbers), tensors, {})
    first = time.perf_counter() - began
    checkpoints.wait()
    ways: dict[str, Callable[[], object]] = {
        "copy": lambda: there.copy_(flat),
        "save": lambda: checkpoints.save(next(numbers), tensors, {}),
        "wait": checkpoints.wait,
        "blocking": lambda: save_blocking(tensors, Store(folder / "old")),
    }
    taken = seconds(ways, rounds=ROUNDS)
    found = {
        "blocking save, as before": taken["blocking"],
        "first save: copy into new memory": first,
        "a later save: copy": taken["save"],
        "copy of one flat tensor": taken["copy"],
        "write in a thread": taken["wait"],
    }
    rows = [[n, f"{t:.2f}", f"{size / t / 1e9:.2f}", times(taken["copy"] / t)] for n, t in found.items()]
    parameters = sum(tensor.numel() for name, tensor in tensors.items() if name.startswith("weight."))
    title = f"save of {parameters / 1e6:.0f} M parameters with EMA and moments, {size / 1e9:.2f} GB"
    show(title, ["", "s", "GB/s", "of one flat copy"], rows)


def save_blocking(tensors: dict[str, Tensor], folder: Store) -> None:
    """As earlier versions did."""
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    sha256 = hashlib.sha256(data).hexdigest()
    folder.write(f"{sha256[:16]}.safetensors", data)
    folder.write("checkpoint.json", b"{}")


def measure_share(step: Callable[[int], object], learner: Learner, checkpoints: Checkpoints) -> None:
    """Show what share of the processor time checkpoints cost."""
    numbers = iter(range(1000, 2000))
    of_step = min(processor_seconds(partial(step, index)) for index in range(1, STEPS + 1))
    copies, writes = [], []
    for _ in range(ROUNDS):
        copies.append(processor_seconds(lambda: checkpoints.save(next(numbers), learner.tensors(), {})))
        writes.append(processor_seconds(checkpoints.wait))
    found = {"copy": min(copies), "write": min(writes), "both": min(copies) + min(writes)}
    rows = [["a step", f"{of_step:.2f}", ""]]
    rows += [[n, f"{t:.2f}", percent(t / (t + EVERY * of_step))] for n, t in found.items()]
    title = f"training of generator B, batch {BATCH}, bf16, with a checkpoint every {EVERY} steps"
    show(title, ["", "processor seconds", "of the training"], rows)


def processor_seconds(call: Callable[[], object]) -> float:
    """Measure the processor time of all threads during a call."""
    began = time.process_time()
    call()
    return time.process_time() - began


if __name__ == "__main__":
    main()
