"""Runs benchmarks, each in a process of its own: `python -m tests.benchmarks [NAME ...] [--full]`, all without names.

A benchmark measures itself beside its reference, or beside the machine's limit, in one run and prints the ratio:
times of a shared machine mean little, ratios more.
"""

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
NAMES = sorted(path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py"))


def main(arguments: list[str]) -> int:
    names = [argument for argument in arguments if not argument.startswith("--")]
    options = [argument for argument in arguments if argument.startswith("--")]  # those of the benchmarks themselves
    if unknown := sorted(set(names) - set(NAMES)):
        sys.stderr.write(f"unknown benchmarks {', '.join(unknown)}; there are: {', '.join(NAMES)}\n")
        return 2
    codes = []
    for name in names or NAMES:
        sys.stdout.write(f"== {name}\n")
        sys.stdout.flush()
        codes.append(
            subprocess.run([sys.executable, "-m", f"tests.benchmarks.bench_{name}", *options], check=False).returncode
        )
    return max(codes, default=0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
