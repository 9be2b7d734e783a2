"""Encoding on a cluster of several machines (Ray's raylets, each with its own processes), one of which is lost."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.pipeline import graph
from flows.stage import plan_of
from infra.artifacts.lineage import resolve
from infra.artifacts.manifest import ArtifactRef, Manifest, manifest_of, verify
from infra.compute.cluster import ENVIRONMENT, session
from infra.compute.workers import WorkerOptions
from infra.store.store import Store
from tests.support import ROOT
from tests.support.small_dataset import Made, draw_images

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

IMAGES = 400
SETTINGS = ["data.num_shards=30", 'encode.variants=["center", "flip", "affine-1", "affine-2"]', "encode.micro_batch=4"]
PATIENCE = 240  # seconds


class Machines:
    """A head without cores for the driver, and two nodes that do the work."""

    def __init__(self, cores: int) -> None:
        from ray.cluster_utils import Cluster

        self.cluster: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        self.nodes = [self.cluster.add_node(num_cpus=cores, resources={f"node_{n}": 1}) for n in range(2)]
        self.cluster.wait_for_nodes()

    def lose_one(self) -> None:
        """Kill a node that the driver is not on, as a power cut does: nothing there has time to say goodbye."""
        import ray

        driver = ray.get_runtime_context().get_node_id()
        victim = next(node for node in self.nodes if node.node_id != driver)
        self.cluster.remove_node(victim, allow_graceful=False)


@pytest.fixture(params=[2, 1], ids=["room_for_all", "room_for_half"])
def machines(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machines]:
    """Two nodes; after one is lost the other has room for all workers, or for half of them."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # nodes know the code, as on real machines
    machines = Machines(request.param)
    yield machines
    machines.cluster.shutdown()


def made(store: Store, source: Path, workers: int) -> tuple[Made, dict[str, ArtifactRef]]:
    """Images and a tokenizer, and a job whose next stage runs on so many workers."""
    made = Made(store, source, *SETTINGS)
    inputs = {"images": made.run(graph.PREPARE), "tokenizer": made.tokenizer(0)}
    made.job = made.job._replace(workers=WorkerOptions(workers=workers))
    return made, inputs


def hashes(manifest: Manifest) -> list[tuple[str, str]]:
    return [(entry.path, entry.sha256) for entry in manifest.files]


def test_a_node_is_lost_in_the_middle_and_the_bytes_are_the_same(machines: Machines, tmp_path: Path) -> None:
    draw_images(tmp_path / "data", IMAGES)
    alone, inputs = made(Store(tmp_path / "alone"), tmp_path / "data", 0)
    expected = hashes(manifest_of(alone.store, alone.run(graph.ENCODE, **inputs)))

    many, inputs = made(Store(tmp_path / "many"), tmp_path / "data", 2)
    codes = many.store.at(plan_of(graph.ENCODE, many.job, inputs).prefix)
    lost: list[int] = []

    def lose_a_node() -> None:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            done = sum(name.endswith(".parquet.json") for name in codes.list())
            if done >= 3:
                machines.lose_one()
                lost.append(done)
                return
            time.sleep(0.01)

    thread = threading.Thread(target=lose_a_node)
    thread.start()
    with session(machines.cluster.address):
        ref = many.run(graph.ENCODE, **inputs)
    thread.join()
    manifest = resolve(many.store, str(ref))
    assert lost
    assert lost[0] < manifest.counts["shards"], "it was lost after the work was done"
    assert hashes(manifest) == expected
    verify(many.store, manifest)
