"""Shared by the benchmarks: a table on standard output, and times taken in turns."""

import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Write a table: the first column to the left, the others to the right; below it, how busy the machine was."""
    cells = [[str(cell) for cell in row] for row in (columns, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells]
    load = f"(load of the last minute: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores)"
    sys.stdout.write("\n".join([title, lines[0], "-" * len(lines[0]), *lines[1:], load, "", ""]))
    sys.stdout.flush()


def seconds(ways: Mapping[str, Callable[[], object]], *, rounds: int, warm: bool = True) -> dict[str, float]:
    """Measure the shortest time of each way, in seconds.

    The ways take turns, so that other load of the machine affects all of them, and the shortest times least.
    """
    taken = dict.fromkeys(ways, math.inf)
    for round_ in range(-1 if warm else 0, rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if round_ >= 0:
                taken[name] = min(taken[name], time.perf_counter() - started)
    return taken


def times(ratio: float) -> str:
    """A ratio as it is printed."""
    return f"{ratio:.2f}x"


def percent(share: float) -> str:
    """A share as it is printed."""
    return f"{100 * share:.1f} %"
