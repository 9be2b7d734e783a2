"""Run benchmarks: `python -m tests.benchmarks [NAME ...] [--full]` runs those of CPUs, all of them without names.

`python -m tests.benchmarks --device cuda [SECTION ...] [--json FILE]` runs those of a GPU, which fit ten minutes, and
`--quick` those same sections at toy sizes on any device, to see that they run.

A benchmark measures itself beside its reference, or beside the machine's limit, in one run and prints the ratio:
times of a shared machine mean little, ratios more.
"""

import argparse
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent
NAMES = sorted(path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py"))


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks of CPUs, or sections of a device; all")
    parser.add_argument("--full", action="store_true", help="of CPUs: go to larger sizes where there are any")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="the sections of a device at toy sizes: a dry run")
    parser.add_argument("--samples", type=int, help="images of the section `whole` (5,000; as published: 50,000)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="of a device: write the figures, too")
    options = parser.parse_args(arguments)
    if options.device == "cuda" or options.quick:
        return on_device(options)
    if refused := unknown(options.names, NAMES):
        return refused
    codes = []
    for name in options.names or NAMES:
        sys.stdout.write(f"== {name}\n")
        sys.stdout.flush()
        command = [sys.executable, "-m", f"tests.benchmarks.bench_{name}", *["--full"] * options.full]
        codes.append(subprocess.run(command, check=False).returncode)
    return max(codes, default=0)


def on_device(options: argparse.Namespace) -> int:
    # Imported here: the benchmarks of CPUs need none of it.
    from tests.benchmarks.device.runner import QUICK_SAMPLES, SAMPLES, Options, run_sections
    from tests.benchmarks.device.sections import SECTIONS
    from tests.support.need_cuda import missing_cuda

    if refused := unknown(options.names, list(SECTIONS)):
        return refused
    if options.device == "cuda" and (missing := missing_cuda()) is not None:
        sys.stderr.write(f"{missing}; --quick without --device runs the same sections on the CPU\n")
        return 2
    samples = options.samples or (QUICK_SAMPLES if options.quick else SAMPLES)
    return run_sections(options.names or list(SECTIONS), Options(options.device, options.quick, samples, options.json))


def unknown(names: Sequence[str], there: Sequence[str]) -> int:
    """Report unknown names; return the exit status 2 if there are any, else 0."""
    missing = sorted(set(names) - set(there))
    if missing:
        sys.stderr.write(f"unknown benchmarks {', '.join(missing)}; there are: {', '.join(there)}\n")
    return 2 if missing else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what it started ends with it
    sys.exit(main(sys.argv[1:]))
