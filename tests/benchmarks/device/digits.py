"""The whole pipeline on digits: seconds of each stage on the device beside two cores of the CPU.

With a twelfth of the recipe's steps, so that both fit: a stage's own start weighs more than in a whole run.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from flows.recipes import RECIPES
from tests.benchmarks.device.bench import Bench

CORES, SHARE = 2, 12
STAGES = ("teacher", "warm_up", "align", "fine_tune", "train_generator")


def run(bench: Bench) -> None:
    """Both, each in a store of its own."""
    devices = ["cpu"] if bench.device.type == "cpu" else ["cpu", bench.device.type]
    found: dict[str, dict[str, float]] = {}
    for device in devices:
        bench.attempt(f"digits on {device}", lambda device=device: found.update({device: stages(bench, device)}))
    for stage, seconds in found.get(bench.device.type, {}).items():
        cpu = found.get("cpu", {}).get(stage)
        note = "" if cpu is None or bench.device.type == "cpu" else f"({cpu:.1f} s on {CORES} cores)"
        bench.put(f"{stage} on {bench.device.type}", seconds, "s", note=note)


def stages(bench: Bench, device: str) -> dict[str, float]:
    """Seconds of each stage of a run on a device."""
    with tempfile.TemporaryDirectory(prefix="digits-") as folder, cores(CORES if device == "cpu" else None):
        command = [
            sys.executable,
            "-c",
            "from flows.cli import main; main()",
            "run",
            "--json",
            "--store",
            f"{folder}/store",
        ]
        command += ["--device", device, *(["digits_tiny"] if bench.is_quick else ["digits", *shorter()])]
        environment = os.environ | {"SFTOK_HOME": folder}  # where its servers keep their files
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    told = json.loads(done.stdout)
    return {name: float(stage["seconds"]) for name, stage in told["stages"].items()}


def shorter() -> list[str]:
    """Settings that leave a share of the steps."""
    recipe = RECIPES["digits"]()
    values = {"train_generator": recipe.train_generator.steps}
    assert recipe.evaluate.sweep is not None
    values["evaluate.sweep.train_generator"] = recipe.evaluate.sweep.train_generator.steps
    values |= {f"{stage}.training": getattr(recipe, stage).training.steps for stage in STAGES[:-1]}
    return [word for name, steps in values.items() for word in ("--set", f"{name}.steps={steps // SHARE}")]


@contextlib.contextmanager
def cores(count: int | None) -> Iterator[None]:
    """Run on so many cores within the block; None: on all."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
