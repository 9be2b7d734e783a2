"""One section in a process of its own: `python -m tests.benchmarks.device SECTION --device cuda ...`; see `runner`."""

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path

from infra.compute.device import IEEE, use_numerics
from tests.benchmarks.device.bench import Bench, Figure, be_quick
from tests.benchmarks.device.sections import SECTIONS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.device")
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("--device", required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seconds", type=float, required=True, help="no figure is begun after them")
    parser.add_argument("--samples", type=int, required=True)
    parser.add_argument("--figures", type=Path, required=True, help="file that figures are added to, a JSON line each")
    options = parser.parse_args()

    def put(figure: Figure) -> None:
        sys.stdout.write(figure.line() + "\n")
        sys.stdout.flush()
        with options.figures.open("a") as file:
            file.write(json.dumps(dataclasses.asdict(figure)) + "\n")

    if options.quick:
        be_quick()
    bench = Bench(
        options.section,
        options.device,
        is_quick=options.quick,
        seconds=math.inf if options.quick else options.seconds,
        samples=options.samples,
        put=put,
    )
    use_numerics(IEEE, options.device)
    bench.peak("bf16"), bench.peak("fp32"), bench.bandwidth()  # before the section fills the memory
    bench.attempt(options.section, lambda: SECTIONS[options.section].run(bench))
    return 1 if bench.failed else 0


if __name__ == "__main__":
    sys.exit(main())
