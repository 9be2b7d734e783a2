"""Seconds from a generator in memory to the first sample of a new process, with an empty and with a filled cache.

Compiled graphs are kept in folders: without any of them a process compiles, with them it reads.
"""

import os
import subprocess
import sys
import tempfile
import time

import torch

from generator.autoregressive import Generator
from generator.config import GENERATORS, SampleConfig
from generator.kinds import prepare_sampler
from tests.benchmarks.device.bench import Bench, be_quick
from tests.benchmarks.device.sample import SCALE, SPACE, TOY_SPACE

BATCH, QUICK_BATCH = 256, 4
CACHES = ("SFTOK_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def run(bench: Bench) -> None:
    """Generator B, compiled in bf16."""
    with tempfile.TemporaryDirectory() as folder:
        for cache in ("cold", "warm"):
            name = f"first sample, {cache} cache"
            bench.attempt(name, lambda name=name: bench.put(name, first(bench, folder), "s"))


def first(bench: Bench, folder: str) -> float:
    """What a process of its own says."""
    command = [sys.executable, "-m", "tests.benchmarks.device.first_sample", bench.device.type]
    environment = os.environ | {name: os.path.join(folder, name) for name in CACHES}
    done = subprocess.run(
        [*command, *["quick"] * bench.is_quick], check=True, stdout=subprocess.PIPE, text=True, env=environment
    )
    return float(done.stdout.split()[-1])


def measure(device: str, *, is_quick: bool) -> float:
    """Seconds to prepare and draw the first micro-batch, with the device in use already."""
    if is_quick:
        be_quick()
    config, space, batch = ("toy", TOY_SPACE, QUICK_BATCH) if is_quick else ("B", SPACE, BATCH)
    torch.manual_seed(0)
    with torch.device(device):
        model = Generator(GENERATORS[config], space).eval()
        model.initialise()
    settings = SampleConfig(cfg_scale=SCALE, precision="bf16", compile=True)
    class_B, numbers = torch.arange(batch) % space.num_classes, torch.rand(batch, space.num_tokens)
    began = time.perf_counter()
    prepare_sampler(model, settings)(class_B, numbers).cpu()
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.stdout.write(f"{measure(sys.argv[1], is_quick='quick' in sys.argv)}\n")
