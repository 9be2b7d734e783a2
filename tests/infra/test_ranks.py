"""Ranks: they share, sum and wait; what goes wrong in one is said as itself; a lost one is replaced."""

import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from infra.cluster import session
from infra.progress import Progress
from infra.ranks import ALONE, Ranks, run_ranks


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    with session(num_cpus=2):
        yield


def sum_up(ranks: Ranks, progress: Progress) -> tuple[list[float], list[float]]:
    mine = torch.tensor([ranks.rank + 1.0, 10.0])
    gradients = [torch.full((3, 2), float(ranks.rank)), torch.full((2,), 1.0)]
    ranks.totals_(gradients)
    ranks.wait()
    progress(1, 1, {"rank": ranks.rank})
    return ranks.total(mine).tolist(), [g.mean().item() for g in gradients]


def test_two_ranks_sum_and_the_first_ones_result_is_the_result() -> None:
    assert run_ranks(sum_up, 2) == ([3.0, 20.0], [1.0, 2.0])


def test_alone_there_is_nothing_to_sum() -> None:
    assert run_ranks(sum_up, 1) == ([1.0, 10.0], [0.0, 1.0])
    assert os.getpid() == run_ranks(lambda ranks, progress: os.getpid(), 1)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_part_is_some_ranks_and_in_order(size: int) -> None:
    shares = [list(Ranks(rank, size).share(8)) for rank in range(size)]
    assert [part for share in shares for part in share] == list(range(8))


def test_parts_that_cannot_be_shared_are_refused() -> None:
    assert list(ALONE.share(3)) == [0, 1, 2]
    with pytest.raises(ValueError, match=r"3 micro-batches .* divide by 2 ranks; set training\.micro_batch"):
        Ranks(0, 2).share(3)


def fail_in_the_second(ranks: Ranks, progress: Progress) -> None:
    if ranks.rank == 1:
        raise ValueError("a broken config")
    ranks.wait()  # the first one waits for somebody who will not come


def test_an_error_of_one_rank_is_the_error_of_all() -> None:
    with pytest.raises(ValueError, match="a broken config"):
        run_ranks(fail_in_the_second, 2)


def die_once(marker: Path, ranks: Ranks, progress: Progress) -> str:
    if ranks.rank == 1 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    ranks.wait()
    return "done"


def test_a_killed_rank_is_replaced(tmp_path: Path) -> None:
    assert run_ranks(partial(die_once, tmp_path / "died"), 2) == "done"
    assert (tmp_path / "died").exists()
