"""On a cluster that machines join and leave, ranks wait for room, go on with fewer, and end with their driver."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from infra.compute.cluster import ENVIRONMENT, session
from infra.compute.ranks import Ranks, run_ranks
from infra.progress import Progress
from tests.support import ROOT
from tests.support.serving_process import until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PATIENCE = 120.0  # seconds


class Machines:
    """A head without cores, and a node of one core; more come and go."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        self.nodes: list[Any] = []
        self.add()

    def add(self) -> None:
        self.nodes.append(self.cluster.add_node(num_cpus=1))

    def lose(self) -> None:
        """Kill the last node that the driver is not on, as a power cut does."""
        import ray

        driver = ray.get_runtime_context().get_node_id()
        victim = next(node for node in reversed(self.nodes) if node.node_id != driver)
        self.nodes.remove(victim)
        self.cluster.remove_node(victim, allow_graceful=False)


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (ENVIRONMENT | {"PYTHONPATH": str(ROOT)}).items():
            patch.setenv(name, value)
        machines = Machines()
        yield machines
        machines.cluster.shutdown()


@pytest.fixture
def joined(machines: Machines) -> Iterator[Machines]:
    with session(machines.cluster.address):
        yield machines


def size_of(ranks: Ranks, progress: Progress) -> int:
    ranks.wait()
    return ranks.size


def test_ranks_without_room_are_refused_in_time_and_say_what_they_wait_for(
    joined: Machines, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import ray

    monkeypatch.setenv("SFTOK_RAY_WAIT", "7")
    told: list[dict[str, float]] = []
    said = r"^no room for 2 ranks of 1 core each within SFTOK_RAY_WAIT = 7 s: the Ray cluster has 1 CPUs, .*; lower"
    with pytest.raises(ValueError, match=said) as refused:
        run_ranks(size_of, 2, progress=lambda done, total, figures: told.append(dict(figures)))
    assert len(str(refused.value)) < 400
    assert told
    assert (told[-1]["cores_needed"], told[-1]["cores_there"]) == (2, 1)
    assert "waiting up to 7 s for room for 2 ranks of 1 core each" in caplog.text
    with pytest.raises(ValueError, match=r"^no room for 1 rank of 1 GPU and 1 core each .* has 1 CPUs, 0 GPUs"):
        run_ranks(size_of, 1, gpus=1)
    assert {group["state"] for group in ray.util.placement_group_table().values()} == {"REMOVED"}


def test_ranks_wait_for_a_machine_that_joins_and_elastic_ones_go_on_with_fewer_after_one_is_lost(
    joined: Machines, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Machines come and go in the main thread, as Ray's test cluster wants it."""
    asked = threading.Event()
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(run_ranks, size_of, 2, progress=lambda *_: asked.set())
        assert asked.wait(PATIENCE)
        joined.add()
        assert waiting.result(PATIENCE) == 2

        time.sleep(25)  # Ray Train's view of the machines is up to 20 s old
        training = thread.submit(run_ranks, partial(stay_until_alone, tmp_path), "1:2")
        until(lambda: len(list(tmp_path.iterdir())) == 2, PATIENCE, "two ranks did not begin")
        time.sleep(1)
        joined.lose()
        assert training.result(PATIENCE) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0-of-1", "0-of-2", "1-of-2"]
    assert "a training process was lost (rank " in caplog.text
    assert "the number of ranks is 1 from the last checkpoint on, instead of 2" in caplog.text


def stay_until_alone(folder: Path, ranks: Ranks, progress: Progress) -> int:
    (folder / f"{ranks.rank}-of-{ranks.size}").touch()
    while ranks.size > 1:
        time.sleep(0.2)
        ranks.wait()
    return ranks.size


DRIVER = """
import sys
from functools import partial
from pathlib import Path
from infra.compute.cluster import session
from infra.compute.ranks import run_ranks
from tests.infra.compute.test_elastic_ranks import sleep_long
with session(sys.argv[1]):
    run_ranks(partial(sleep_long, Path(sys.argv[2])), "1:2")
"""


def sleep_long(folder: Path, ranks: Ranks, progress: Progress) -> None:
    (folder / str(os.getpid())).touch()
    time.sleep(600)


def test_ranks_of_a_driver_that_is_killed_end(machines: Machines, tmp_path: Path) -> None:
    before = processes(machines)
    command = [sys.executable, "-c", DRIVER, machines.cluster.address, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT) as driver:
        until(lambda: list(tmp_path.iterdir()), PATIENCE, "no rank began")
        assert processes(machines) - before
        driver.send_signal(signal.SIGKILL)
    until(lambda: not processes(machines) - before, PATIENCE, lambda: processes(machines) - before)


def processes(machines: Machines) -> set[str]:
    """The processes of Ray Train's on any machine, but the one of a cluster that asks for machines."""
    found = set()
    for one in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if re.search(r"ray::(Messenger|Train|RayTrain|Synch)", " ".join(one.cmdline())):
                found.add(f"{one.pid} {one.cmdline()[0]}")
    return found
