"""The whole pipeline on digits: seconds of each stage on the device beside two cores of the CPU.

With a twelfth of the recipe's steps, so that both fit: a stage's own start weighs more than in a whole run.
"""

import json
import os
import subprocess
import sys
import tempfile

from flows.recipes.registry import RECIPES
from tests.benchmarks.device.bench import Bench

CORES, SHARE = 2, 12
STAGES = ("teacher", "warm_up", "align", "fine_tune", "train_generator")


def run(bench: Bench) -> None:
    """Both at once, each on cores and in a store of its own."""
    devices = dict.fromkeys(("cpu", bench.device.type))
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        started = {device: start(bench, device, f"{folder}/{device}") for device in devices}
        for device, process in started.items():
            bench.attempt(
                f"digits on {device}", lambda device=device, process=process: found.update({device: stages(process)})
            )
    for stage, seconds in found.get(bench.device.type, {}).items():
        cpu = found.get("cpu", {}).get(stage)
        note = "" if cpu is None or bench.device.type == "cpu" else f"({cpu:.1f} s on {CORES} cores)"
        bench.put(f"{stage} on {bench.device.type}", seconds, "s", note=note)


def start(bench: Bench, device: str, folder: str) -> "subprocess.Popen[str]":
    """Begin a run on a device: on the first cores where it computes on the CPU, else on the others if there are any."""
    command = [sys.executable, "-c", "from flows.cli.main import main; main()", "run", "--json", "--device", device]
    command += [
        "--store",
        f"{folder}/store",
        *(["digits_tiny", "--workers", "0"] if bench.is_quick else ["digits", *shorter()]),
    ]
    environment = os.environ | {"SFTOK_HOME": folder}  # where its servers keep their files
    there = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, there[:CORES] if device == "cpu" else there[CORES:] or there)
    try:
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    finally:
        os.sched_setaffinity(0, there)


def stages(process: "subprocess.Popen[str]") -> dict[str, float]:
    """Wait for a run: seconds of each stage."""
    told = json.loads(process.communicate()[0])
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}: {told.get('error')}")
    return {name: float(stage["seconds"]) for name, stage in told["stages"].items()}


def shorter() -> list[str]:
    """Settings that leave a share of the steps."""
    recipe = RECIPES["digits"]()
    values = {"train_generator": recipe.train_generator.steps}
    assert recipe.evaluate.sweep is not None
    values["evaluate.sweep.train_generator"] = recipe.evaluate.sweep.train_generator.steps
    values |= {f"{stage}.training": getattr(recipe, stage).training.steps for stage in STAGES[:-1]}
    return [word for name, steps in values.items() for word in ("--set", f"{name}.steps={steps // SHARE}")]
