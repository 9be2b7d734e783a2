"""Cost of Prefect, Ray and the bookkeeping: the whole `digits` run beside its bare library calls in one process.

The bare calls are those of the run's stages, one after the other, each artifact published so that the next can be made
of it. `--tiny` takes `digits_tiny`, which is nearly all orchestration. Also: the time that `sftok --help` takes.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks.table import percent, show

LIMIT_SHARE, LIMIT_SECONDS = 0.15, 20.0
ROUNDS = 7
SFTOK = [sys.executable, "-c", "from flows.cli.main import main; main()"]


def main() -> None:
    recipe = "digits_tiny" if "--tiny" in sys.argv else "digits"
    with tempfile.TemporaryDirectory() as place:
        environment = {**os.environ, "SFTOK_HOME": f"{place}/home"}
        environment.pop("PREFECT_API_URL", None)
        first = server_start(Path(place, "home"))  # on a new home it makes its database
        then = server_start(Path(place, "home"))
        command = [sys.executable, "-m", "tests.benchmarks.bench_orchestration", "bare", recipe, f"{place}/bare"]
        bare = json.loads(output(command, environment))
        started = time.perf_counter()
        record = json.loads(output([*SFTOK, "run", recipe, "--store", f"{place}/run", "--json"], environment))
        wall = time.perf_counter() - started
        started = time.perf_counter()
        output([*SFTOK, "run", recipe, "--store", f"{place}/run", "--json"], environment)
        again = time.perf_counter() - started
    rows = [[name, f"{taken:.1f}", f"{record['stages'][name]['seconds']:.1f}"] for name, taken in bare.items()]
    library = sum(bare.values())
    cost, limit = wall - library, max(LIMIT_SHARE * library, LIMIT_SECONDS)
    rows += [
        ["all, wall time", f"{library:.1f}", f"{wall:.1f}"],
        ["orchestration", "", f"{cost:.1f} ({percent(cost / library)}; at most {limit:.0f})"],
        ["the same run again", "", f"{again:.1f}"],
        ["of these, the server's start", "", f"{then:.1f}"],
        ["its start on a new home, once", "", f"{first:.1f}"],
    ]
    show(f"{recipe}: bare library calls, and the run", ["stage", "bare s", "run s"], rows)
    taken = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        output([*SFTOK, "--help"], environment)
        taken.append(time.perf_counter() - started)
    middle = f"{statistics.median(taken):.2f}"
    show("sftok --help", ["", "shortest s", "median s"], [["in a new process", f"{min(taken):.2f}", middle]])


def server_start(home: Path) -> float:
    """Seconds until a temporary Prefect server answers."""
    from flows.prefect_server.temporary import start_server

    started = time.perf_counter()
    server = start_server(home)
    try:
        server.wait()
        return time.perf_counter() - started
    finally:
        server.stop()


def output(command: list[str], environment: dict[str, str]) -> str:
    """Return the standard output of a process."""
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def bare(name: str, root: str) -> None:
    """Every stage of a recipe by its library call; seconds of each."""
    from flows.make import make
    from flows.pipeline import graph
    from flows.recipes.files import load_recipe
    from flows.stage import StageJob
    from infra.artifacts.manifest import ArtifactRef
    from infra.compute.workers import WorkerOptions
    from infra.store.store import Store

    recipe, store = load_recipe(name), Store(Path(root))
    job = StageJob(recipe, store, recipe.source, WorkerOptions())
    known: dict[str, ArtifactRef] = {}
    seconds: dict[str, float] = {}
    for stage in graph.GRAPH.order(recipe):
        started = time.perf_counter()
        made, _ = make(stage, job, {need: known[of] for need, of in stage.inputs(recipe).items()})
        known[stage.name] = made.ref
        seconds[stage.name] = time.perf_counter() - started
    sys.stdout.write(json.dumps(seconds))


if __name__ == "__main__":
    if sys.argv[1:2] == ["bare"]:
        bare(*sys.argv[2:])
    else:
        main()
