"""Ranks share, sum and wait; errors in one are raised unchanged; lost ones are replaced."""

import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from infra.compute.cluster import session
from infra.compute.ranks import ALONE, WAIT_SECONDS, Ranks, process_group, run_ranks
from infra.compute.workers import WorkerOptions, map_shards
from infra.progress import Progress, silent


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    """A cluster with a declared GPU, which need not exist."""
    import ray

    with pytest.MonkeyPatch.context() as patch, session(num_cpus=2):
        patch.setattr(ray, "init", partial(ray.init, num_gpus=1))
        yield


def sum_up(ranks: Ranks, progress: Progress = silent) -> tuple[list[float], list[int]]:
    mine = torch.tensor([ranks.rank + 1.0, 10.0])
    ranks.wait()
    return ranks.total(mine).tolist(), ranks.all_of(ranks.rank, "cpu")


def test_alone_there_is_nothing_to_sum() -> None:
    assert run_ranks(sum_up, 1) == ([1.0, 10.0], [0])
    assert os.getpid() == run_ranks(lambda ranks, progress: os.getpid(), 1)


def sum_up_and_report(ranks: Ranks, progress: Progress) -> tuple[list[float], list[int]]:
    sums = sum_up(ranks)
    for step in range(50):
        progress(step, 50, {"val_nll": float(step)} if step == 20 else {})
        ranks.wait()
    time.sleep(1.5 * WAIT_SECONDS)  # the caller asks that often
    return sums


@pytest.mark.parametrize("wait", [WAIT_SECONDS, 0.001])  # the latter: most answers are late
def test_two_ranks_sum_and_every_report_of_the_first_arrives_in_order(
    wait: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validations are judged while a training goes on: the one in 50 that holds a validation was lost."""
    monkeypatch.setattr("infra.compute.ranks.WAIT_SECONDS", wait)
    reports: list[tuple[int, int, dict[str, float]]] = []
    listen: Progress = lambda done, total, figures: reports.append((done, total, dict(figures)))  # noqa: E731
    assert run_ranks(sum_up_and_report, 2, progress=listen) == ([3.0, 20.0], [0, 1])
    assert reports == [(step, 50, {"val_nll": 20.0} if step == 20 else {}) for step in range(50)]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_part_is_some_ranks_and_in_order(size: int) -> None:
    shares = [list(Ranks(rank, size).share(8)) for rank in range(size)]
    assert [part for share in shares for part in share] == list(range(8))


def test_parts_that_cannot_be_shared_are_refused() -> None:
    assert list(ALONE.share(3)) == [0, 1, 2]
    with pytest.raises(
        ValueError, match=r"3 micro-batches .* cannot be shared equally by 2 ranks; set training\.micro_batch"
    ):
        Ranks(0, 2).share(3)


def fail_in_the_second(ranks: Ranks, progress: Progress) -> None:
    if ranks.rank == 1:
        raise ValueError("a broken config")
    ranks.wait()  # the first one waits for somebody who will not come


def test_an_error_of_one_rank_is_the_error_of_all() -> None:
    with pytest.raises(ValueError, match="a broken config"):
        run_ranks(fail_in_the_second, 2)


@pytest.mark.parametrize(("backend", "left"), [("gloo", 1), ("nccl", 0)])
def test_a_rank_that_fails_does_not_wait_for_the_others_to_leave(
    backend: str, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leaving an NCCL group is collective while the others wait for a sum: the error would never be reported."""
    leaving: list[str] = []
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *_, **__: None)
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: leaving.append(backend))
    with process_group(Ranks(1, 2), ("there", 0), object(), backend=backend):
        pass
    assert len(leaving) == 1
    leaving.clear()
    with pytest.raises(ValueError, match="memory"), process_group(Ranks(1, 2), ("there", 0), object(), backend=backend):
        raise ValueError("memory ran out")
    assert len(leaving) == left


def die_once(marker: Path, ranks: Ranks, progress: Progress) -> str:
    if ranks.rank == 1 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    ranks.wait()
    return "done"


def test_a_killed_rank_is_replaced(tmp_path: Path) -> None:
    assert run_ranks(partial(die_once, tmp_path / "died"), 2) == "done"
    assert (tmp_path / "died").exists()


def place_and_workers(ranks: Ranks, progress: Progress) -> tuple[int, str, list[str]]:
    """Return where a process runs, and where workers run that it starts itself."""
    options = WorkerOptions(workers=1, gpus_per_worker=0.99)
    return os.getpid(), os.environ["CUDA_VISIBLE_DEVICES"], map_shards(make_place, [0], options=options)


def make_place() -> partial[str]:
    return partial(lambda shard: os.environ["CUDA_VISIBLE_DEVICES"])


def test_on_a_gpu_one_rank_has_a_process_of_its_own_and_leaves_room_for_its_workers() -> None:
    """Guards against an evaluation that waits for its own card."""
    pid, *places = run_ranks(place_and_workers, 1, gpus=0.01)
    assert pid != os.getpid()
    assert places == ["0", ["0"]]
    with pytest.raises(ValueError, match=r"^2 processes need a GPU each, and this machine has 1: lower --ranks$"):
        run_ranks(place_and_workers, 2, gpus=1.0)


class Rung(BaseException):
    pass


def ring(*_: object) -> None:
    raise Rung


def ring_and_wait(driver: int, ranks: Ranks, progress: Progress) -> None:
    os.kill(driver, signal.SIGALRM)
    time.sleep(60)


def make_ringing(driver: int) -> partial[None]:
    return partial(ring_and_wait, driver, ALONE)


WAITS = {
    "ranks": lambda: run_ranks(partial(ring_and_wait, os.getpid()), 2),
    "workers": lambda: map_shards(partial(make_ringing, os.getpid()), [silent], options=WorkerOptions(workers=1)),
}


@pytest.mark.parametrize("what", WAITS)
def test_a_signal_while_ray_waits_comes_out_as_itself(what: str) -> None:
    """Guards against Ray's compiled code, whose SystemError was reported as a failure of the stage."""
    before = signal.signal(signal.SIGALRM, ring)
    try:
        with pytest.raises(Rung):
            WAITS[what]()
    finally:
        signal.signal(signal.SIGALRM, before)
