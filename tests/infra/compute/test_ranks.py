"""Ranks share, sum and wait; errors in one are raised unchanged; lost ones are replaced; nothing of them stays."""

import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch

from infra.compute.cluster import session
from infra.compute.ranks import ALONE, Ranks, run_ranks
from infra.compute.workers import WorkerOptions, map_shards
from infra.errors import TransientError
from infra.progress import Progress, silent
from tests.support.serving_process import command_of, until

PATIENCE = 60.0  # seconds


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
    return sums


def test_two_ranks_sum_and_every_report_of_the_first_arrives_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Validations are judged while a training goes on: the one in 50 that holds a validation was lost."""
    monkeypatch.setattr("infra.compute.launch.train.WAIT_SECONDS", 0.001)  # most answers are late
    reports: list[tuple[int, int, dict[str, float]]] = []
    listen: Progress = lambda done, total, figures: reports.append((done, total, dict(figures)))  # noqa: E731
    assert run_ranks(sum_up_and_report, 2, progress=listen) == ([3.0, 20.0], [0, 1])
    assert reports == [(step, 50, {"val_nll": 20.0} if step == 20 else {}) for step in range(50)]


@pytest.mark.parametrize("size", range(1, 9))
def test_every_part_is_some_ranks_in_order_and_shares_are_alike(size: int) -> None:
    shares = [list(Ranks(rank, size).share(8)) for rank in range(size)]
    assert [part for share in shares for part in share] == list(range(8))
    assert {len(share) for share in shares} <= {8 // size, -(-8 // size)}


def test_fewer_parts_than_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^3 micro-batches per step cannot be shared by 4 ranks; lower --ranks, or"):
        Ranks(0, 4).share(3)


class Own(Exception):
    pass


class Odd(ValueError):
    """An error that cannot be made again from its arguments."""

    def __init__(self, what: str, why: str) -> None:
        super().__init__(f"{what}: {why}")


def fail_in_the_second(attempts: Path, ranks: Ranks, progress: Progress) -> None:
    if ranks.rank == 1:
        attempts.open("a").write("x")
        raise Own("a broken config")
    ranks.wait()  # the first one waits for somebody who will not come


def test_an_error_of_one_rank_is_the_error_of_all_and_is_not_tried_again(tmp_path: Path) -> None:
    with pytest.raises(Own, match=r"^a broken config$"):
        run_ranks(partial(fail_in_the_second, tmp_path / "attempts"), 2)
    assert (tmp_path / "attempts").read_text() == "x"


def test_an_error_that_cannot_be_sent_is_replaced_by_its_text() -> None:
    from infra.compute.launch.rank import WorkError

    same, other = (WorkError.of(error).original() for error in (Own("a broken config"), Odd("a", "b")))
    assert (type(same), str(same)) == (Own, "a broken config")
    assert (type(other), str(other)) == (RuntimeError, "a: b")


def harm_once(marker: Path, harm: signal.Signals, ranks: Ranks, progress: Progress) -> str:
    ranks.wait()
    if ranks.rank == 1 and not marker.exists():
        time.sleep(1)  # until Ray Train knows that all have begun
        marker.write_text(str(os.getpid()))
        os.kill(os.getpid(), harm)
    ranks.wait()
    return os.getcwd()


@pytest.mark.parametrize(
    ("harm", "said"),
    [("SIGKILL", "Worker exit type: SYSTEM_ERROR"), ("SIGSTOP", "it did not respond within SFTOK_RANK_PATIENCE")],
)
def test_a_lost_rank_is_replaced(
    harm: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The other one, whose connection is closed, is not what is said to be lost."""
    monkeypatch.setenv("SFTOK_RANK_PATIENCE", "3")
    work = partial(harm_once, tmp_path / "lost", signal.Signals[harm])
    assert run_ranks(work, 2) == os.getcwd()
    warned = [record.getMessage() for record in caplog.records if record.name == "infra.compute.launch.train"]
    assert len(warned) == 1
    assert warned[0].startswith(f"a training process was lost (rank 1: {said}")
    assert "\n" not in warned[0]
    assert len(warned[0]) < 300
    until(lambda: not psutil.pid_exists(int((tmp_path / "lost").read_text())), PATIENCE, "it is there still")
    assert capfd.readouterr() == ("", "")


class Stuck:
    """An argument that takes a minute to read."""

    def __reduce__(self) -> tuple[object, tuple[int]]:
        return time.sleep, (60,)


def take(argument: object, ranks: Ranks, progress: Progress) -> None:
    raise AssertionError("it has not been read")


def test_ranks_that_do_not_start_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Train would wait for them without end."""
    monkeypatch.setattr("infra.compute.launch.train.START_SECONDS", 3.0)
    with pytest.raises(TransientError, match=r"^the training processes did not start within 3 s"):
        run_ranks(partial(take, Stuck()), 2)


def die(ranks: Ranks, progress: Progress) -> None:
    """Be lost before Ray Train knows that all have begun."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_ranks_that_are_lost_again_and_again_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.compute.launch.train.RESTARTS", 1)
    with pytest.raises(TransientError, match=r"^lost a training process 2 times \(.*Worker exit type: SYSTEM_ERROR"):
        run_ranks(die, 2)


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


def ring_and_wait(driver: int, begun: Path, ranks: Ranks, progress: Progress) -> None:
    (begun / str(os.getpid())).touch()
    os.kill(driver, signal.SIGALRM)
    time.sleep(60)


def make_ringing(driver: int, begun: Path) -> partial[None]:
    return partial(ring_and_wait, driver, begun, ALONE)


WAITS = {
    "ranks": lambda begun: run_ranks(partial(ring_and_wait, os.getpid(), begun), 2),
    "workers": lambda begun: map_shards(
        partial(make_ringing, os.getpid(), begun), [silent], options=WorkerOptions(workers=1)
    ),
}


@pytest.mark.parametrize("what", WAITS)
def test_a_signal_while_ray_waits_comes_out_as_itself_and_ends_the_processes(what: str, tmp_path: Path) -> None:
    """Guards against Ray's compiled code, whose SystemError was reported as a failure of the stage."""
    before = signal.signal(signal.SIGALRM, ring)
    try:
        with pytest.raises(Rung):
            WAITS[what](tmp_path)
    finally:
        signal.signal(signal.SIGALRM, before)
    until(
        lambda: not any(psutil.pid_exists(int(path.name)) for path in tmp_path.iterdir()), PATIENCE, "it is there still"
    )


def test_nothing_of_them_stays() -> None:
    """Neither a process of Ray Train's nor a reservation, which the next ranks would wait for."""
    import ray

    def left() -> list[str]:
        names = [command_of(one) for one in psutil.Process().children(recursive=True)]
        return [name for name in names if "Train" in name or "Messenger" in name or "Synchronization" in name]

    until(lambda: not left(), PATIENCE, "it is there still")
    assert {group["state"] for group in ray.util.placement_group_table().values()} <= {"REMOVED"}
