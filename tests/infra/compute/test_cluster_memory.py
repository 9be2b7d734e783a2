"""The machines of a Ray cluster are asked how much memory their GPUs have."""

from collections.abc import Iterator

import pytest
import torch

from infra.compute import device
from infra.compute.cluster import ENVIRONMENT, cluster_gpu_memory

GB = 10**9


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A cluster of one machine that says it has a GPU."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 1, "include_dashboard": False})
    yield cluster.address
    cluster.shutdown()


def test_the_smallest_gpu_of_a_cluster_counts(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for found in (None, 24 * GB):
        monkeypatch.setattr(device, "gpu_memory", lambda found=found: found)
        assert cluster_gpu_memory(address) == found


def test_a_cluster_that_does_not_answer_is_unknown() -> None:
    assert cluster_gpu_memory("127.0.0.1:1") is None


def test_a_machine_without_gpus_has_no_memory_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "default_device", lambda: "cpu")
    assert device.gpu_memory() is None


@pytest.mark.gpu
def test_a_gpu_says_how_much_it_has() -> None:
    sizes = [torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())]
    assert device.gpu_memory() == min(sizes)
