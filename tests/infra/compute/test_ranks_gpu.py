"""Ranks on GPUs: each has one, sums go over NCCL, and checkpoints can talk over CPUs."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from infra.compute.cluster import session
from infra.compute.ranks import Ranks, run_ranks
from infra.progress import Progress

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    with session():
        yield


def sums(ranks: Ranks, progress: Progress) -> tuple[list[float], int, list[int]]:
    """Return a sum over GPUs, the GPUs that a rank sees, and a sum over CPUs beside it."""
    there = torch.full((3,), ranks.rank + 1.0, device="cuda")
    here = torch.tensor([ranks.rank])
    if ranks.size > 1:
        dist.all_reduce(here)
    return ranks.total(there).tolist(), torch.cuda.device_count(), here.tolist()


@pytest.mark.parametrize("count", [1, 2])
def test_each_rank_has_a_gpu_and_sums_on_gpus_and_cpus(count: int) -> None:
    if torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} GPUs")
    assert run_ranks(sums, count, gpus=1.0) == ([1.0 * count * (count + 1) / 2] * 3, 1, [count - 1])
