"""Runs sections of a device, each in a process of its own that ends when its time is over, and keeps their figures.

A process a section, because what one leaves in the device's memory, its clocks of compilation and a CUDA error that
does not go away would otherwise be the next one's.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from infra.compute.device import IEEE, cpu_features, device_facts
from infra.machine import hardware
from tests.benchmarks.device.sections import SECTIONS

START_SECONDS = 10  # of a section's time, for imports and the device's first use
GRACE_SECONDS = 5
QUICK_SAMPLES, SAMPLES = 8, 5_000


class Options(NamedTuple):
    """What is run, and where."""

    device: str
    is_quick: bool
    samples: int
    json: Path | None


def run_sections(names: Sequence[str], options: Options) -> int:
    """Run sections and print their figures; 1 if one failed or was cut off."""
    facts = machine(options.device)
    sys.stdout.write("".join(f"{name}: {value}\n" for name, value in facts.items()) + "\n")
    sections: dict[str, dict[str, object]] = {}
    figures: list[object] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            file = Path(folder) / name
            file.touch()
            sections[name] = _run_section(name, options, file)
            figures += [json.loads(line) for line in file.read_text().splitlines()]
            if options.json is not None:
                told = {"machine": facts, "quick": options.is_quick, "sections": sections, "figures": figures}
                options.json.write_text(json.dumps(told, indent=1) + "\n")
    return int(any(section["state"] != "done" for section in sections.values()))


def _run_section(name: str, options: Options, file: Path) -> dict[str, object]:
    allowed = SECTIONS[name].seconds
    sys.stdout.write(f"== {name} (at most {allowed} s)\n")
    sys.stdout.flush()
    command = [sys.executable, "-m", "tests.benchmarks.device", name, "--device", options.device]
    command += ["--samples", str(options.samples), "--seconds", str(allowed - START_SECONDS), "--figures", str(file)]
    began = time.perf_counter()
    # A session of its own: compilers and workers that it started end with it.
    process = subprocess.Popen(command + ["--quick"] * options.is_quick, start_new_session=True)
    try:
        state = "failed" if process.wait(timeout=None if options.is_quick else allowed) else "done"
    except subprocess.TimeoutExpired:
        state = "cut off"
    finally:
        if process.poll() is None:
            _end(process)
    taken = time.perf_counter() - began
    sys.stdout.write(f"   {state} after {taken:.0f} s\n\n")
    sys.stdout.flush()
    return {"state": state, "seconds": round(taken, 1)}


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a section with all that it started: asked to first, since servers end more than themselves."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(timeout=GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def machine(device: str) -> dict[str, str]:
    """What the figures were measured on."""
    here = hardware()
    return {
        **device_facts(device, IEEE),
        "cpu": f"{here['cpu']}, {cpu_features()}, {here['cores']} cores, {here['memory_gib']} GiB",
    }
