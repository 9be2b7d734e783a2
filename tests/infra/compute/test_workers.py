import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import psutil
import pytest

from infra.compute.cluster import log_errors_of_ray_threads, session
from infra.compute.workers import WorkerOptions, map_shards
from infra.errors import TransientError
from infra.store.store import Store
from tests.support import ROOT
from tests.support.s3_server import S3Server

HERE = WorkerOptions(workers=0)
TWO = WorkerOptions(workers=2)


MARK = "SFTOK_TEST_MARK"


@pytest.fixture(scope="module")
def ray_session(s3_server: S3Server) -> Iterator[None]:
    """One cluster for all tests here, since starting one takes seconds; its processes know the S3 server.

    It has two declared GPUs, which need not exist.
    """
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray, "init", partial(ray.init, num_gpus=2))
        for name, value in s3_server.environment.items():
            patch.setenv(name, value)
        with session(num_cpus=2):
            map_shards(make_square, [1], options=WorkerOptions(workers=1))
            yield


def make_square(offset: int = 0) -> Callable[[int], int]:
    return lambda shard: shard * shard + offset


def make_slow_first() -> Callable[[int], tuple[int, int]]:
    def work(shard: int) -> tuple[int, int]:
        time.sleep(0.5 if shard == 0 else 0.01)
        return shard, os.getpid()

    return work


def make_describe() -> Callable[[int], tuple[int, int, list[str]]]:
    def work(_: int) -> tuple[int, int, list[str]]:
        import torch  # here, as the work may load it as late as this

        return os.getpid(), torch.get_num_threads(), sys.path

    return work


def make_refusing() -> Callable[[int], int]:
    def work(shard: int) -> int:
        if shard == 2:
            raise ValueError("shard 2: codes out of range; encode again")
        return shard

    return work


def make_impossible() -> Callable[[int], int]:
    raise ValueError("model.safetensors: not a tokenizer")


def make_dying(folder: str, deaths: int) -> Callable[[int], int]:
    def work(shard: int) -> int:
        if shard == 3:
            seen = len(os.listdir(folder))
            if seen < deaths:
                Path(folder, str(seen)).touch()
                os._exit(1)
        return shard

    return work


def make_storing(store: Store) -> Callable[[str], str]:
    def work(name: str) -> str:
        store.write(name, name.encode())
        return store.read(name).decode()

    return work


def make_which_gpus(folder: str) -> Callable[[int], tuple[int, str]]:
    def work(workers: int) -> tuple[int, str]:
        """Return the GPUs that Ray gave this process, once as many processes as there are workers have begun."""
        Path(folder, str(os.getpid())).touch()
        _wait_for(lambda: len(os.listdir(folder)) == workers)
        return os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES", "")

    return work


class TestInProcess:
    def test_needs_no_ray(self) -> None:
        script = (
            "import sys; from infra.compute.workers import *; from infra.compute.cluster import session\n"
            "print(map_shards(lambda: abs, [-1, 2], options=WorkerOptions(workers=0)), 'ray' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        assert done.stdout == "[1, 2] False\n"

    def test_makes_one_worker_and_reports_each_shard(self) -> None:
        made: list[int] = []
        seen: list[tuple[int, int]] = []

        def make() -> Callable[[int], int]:
            made.append(1)
            return make_square()

        def progress(done: int, total: int, figures: Mapping[str, float]) -> None:
            assert figures["shards_per_s"] > 0
            seen.append((done, total))

        assert map_shards(make, [3, 1, 2], options=HERE, progress=progress) == [9, 1, 4]
        assert made == [1]
        assert seen == [(1, 3), (2, 3), (3, 3)]

    def test_computes_with_the_workers_threads_and_restores_ours(self) -> None:
        import torch

        torch.set_num_threads(1)
        options = WorkerOptions(workers=0, threads_per_worker=2)
        [(pid, threads, _)] = map_shards(make_describe, [0], options=options)
        assert (pid, threads, torch.get_num_threads()) == (os.getpid(), 2, 1)

    def test_no_shards_need_no_worker(self) -> None:
        assert map_shards(make_impossible, [], options=HERE) == []
        assert map_shards(make_impossible, [], options=TWO) == []


def test_a_cluster_that_does_not_answer_is_named_at_once() -> None:
    start = time.monotonic()
    with (
        session("127.0.0.1:9"),
        pytest.raises(ValueError, match=r"127\.0\.0\.1:9 cannot be reached.*SFTOK_RAY_ADDRESS"),
    ):
        map_shards(make_square, [1], options=TWO)
    assert time.monotonic() - start < 10


def test_errors_of_rays_own_threads_are_no_tracebacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where Ctrl-C stops a cluster whose driver still subscribes to messages; others are reported as before."""
    raised: list[str] = []
    monkeypatch.setattr(threading, "excepthook", lambda error: raised.append(error.thread.name))
    for _ in range(2):
        log_errors_of_ray_threads()
    for name in ("ray_listen_error_messages", "another"):
        thread = threading.Thread(target=make_impossible, name=name)
        thread.start()
        thread.join()
    assert raised == ["another"]


@pytest.mark.usefixtures("ray_session")
class TestActors:
    def test_results_are_in_the_shards_order_and_the_same_as_here(self) -> None:
        shards = list(range(12))
        seen: list[int] = []

        def progress(done: int, total: int, figures: Mapping[str, float]) -> None:
            seen.append(done)

        results = map_shards(make_slow_first, shards, options=TWO, progress=progress)
        assert [shard for shard, _ in results] == shards
        assert seen == list(range(1, 13))
        assert os.getpid() not in {pid for _, pid in results}
        square = partial(make_square, 5)
        assert map_shards(square, shards, options=TWO) == map_shards(square, shards, options=HERE)

    def test_workers_import_what_we_import_with_their_own_threads(self) -> None:
        options = WorkerOptions(workers=1, threads_per_worker=2)
        [(pid, threads, path)] = map_shards(make_describe, [0], options=options)
        assert pid != os.getpid()
        assert threads == 2
        assert {os.path.abspath(entry) for entry in sys.path if entry.endswith("site-packages")} <= set(path)

    def test_more_workers_than_cores_do_the_work_all_the_same(self) -> None:
        assert map_shards(make_square, [1, 2, 3], options=WorkerOptions(workers=3)) == [1, 4, 9]

    def test_what_no_machine_can_hold_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"64 CPUs and 0 GPUs.*cpus_per_worker"):
            map_shards(make_square, [1], options=WorkerOptions(workers=1, cpus_per_worker=64))

    def test_a_mistake_comes_back_as_itself(self) -> None:
        with pytest.raises(ValueError, match=r"^shard 2: codes out of range; encode again$") as caught:
            map_shards(make_refusing, list(range(4)), options=TWO)
        assert type(caught.value) is ValueError
        with pytest.raises(ValueError, match=r"^model\.safetensors: not a tokenizer$"):
            map_shards(make_impossible, [1], options=TWO)

    def test_a_killed_worker_is_replaced(self, tmp_path: Path) -> None:
        results = map_shards(partial(make_dying, str(tmp_path), 1), list(range(6)), options=TWO)
        assert results == list(range(6))
        assert len(os.listdir(tmp_path)) == 1

    def test_a_worker_that_always_dies_is_a_lost_one(self, tmp_path: Path) -> None:
        with pytest.raises(TransientError, match="lost a worker") as caught:
            map_shards(partial(make_dying, str(tmp_path), 99), list(range(4)), options=WorkerOptions(workers=1))
        assert isinstance(caught.value, ConnectionError)
        assert "\n" not in str(caught.value)
        assert len(os.listdir(tmp_path)) == 4  # three attempts more than the first

    def test_the_cluster_outlives_the_thread_that_used_it_first(self) -> None:
        results: list[list[int]] = []
        for _ in range(2):
            thread = threading.Thread(
                target=lambda: results.append(map_shards(make_square, [2], options=WorkerOptions(workers=1)))
            )
            thread.start()
            thread.join()
        assert results == [[4], [4]]

    @pytest.mark.parametrize("a_gpu", [1, pytest.param(2, marks=pytest.mark.slow)])
    def test_workers_are_placed_on_gpus(self, a_gpu: int, tmp_path: Path) -> None:
        """Workers fill the GPUs, and each sees only its own."""
        workers, share = 2 * a_gpu, 1 / a_gpu
        options = WorkerOptions(workers=workers, cpus_per_worker=share, gpus_per_worker=share)
        places = map_shards(partial(make_which_gpus, str(tmp_path)), [workers] * workers, options=options)
        assert len(dict(places)) == workers
        assert sorted(gpu for _, gpu in places) == sorted(["0", "1"] * a_gpu)

    @pytest.mark.s3
    def test_workers_reach_the_s3_store(self, s3_store: Store) -> None:
        assert map_shards(partial(make_storing, s3_store), ["a", "b"], options=TWO) == ["a", "b"]


class TestProcesses:
    """Output of a driver, and processes that it leaves behind, recognised by a variable that they inherit."""

    def test_stdout_is_ours_alone(self, driver: "Driver") -> None:
        process = driver("dies")
        out, err = process.communicate(timeout=120)
        assert (out, process.returncode) == ("[0, 1, 2, 3, 4, 5]\n", 0)
        assert "a worker process died; its work is done again" in err
        assert "Traceback" not in err
        assert _marked(driver.mark) == []

    @pytest.mark.parametrize(
        ("moment", "number"),
        [
            pytest.param("starts", signal.SIGINT, marks=pytest.mark.slow),
            ("works", signal.SIGINT),
            ("works", signal.SIGKILL),
            pytest.param("works", signal.SIGTERM, marks=pytest.mark.slow),
        ],
    )
    def test_nothing_is_left_after_a_kill(self, driver: "Driver", moment: str, number: signal.Signals) -> None:
        process = driver("sleeps")
        if moment == "starts":
            _wait_for(lambda: len(_marked(driver.mark)) > 1)
        else:
            _wait_for((driver.folder / "works").exists)
            assert len(_marked(driver.mark)) > 4
        process.send_signal(number)
        out, _ = process.communicate(timeout=60)
        assert process.returncode != 0
        assert out == ""
        _wait_for(lambda: _marked(driver.mark) == [])


class Driver:
    """Starter of a program that maps shards."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.mark = folder, uuid.uuid4().hex

    def __call__(self, what: str) -> "subprocess.Popen[str]":
        script = self.folder / "driver.py"
        script.write_text(DRIVER)
        (self.folder / "deaths").mkdir()
        environment = os.environ | {MARK: self.mark, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            [sys.executable, str(script), str(self.folder), what],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Driver]:
    found = Driver(tmp_path)
    yield found
    for process in _marked(found.mark):
        with contextlib.suppress(psutil.Error):
            process.kill()


DRIVER = """
import sys, time
from functools import partial
from pathlib import Path
from infra.compute.cluster import session
from infra.compute.workers import *
from tests.infra.compute.test_workers import make_dying

def make_sleeping(folder):
    def work(shard):
        Path(folder, "works").touch()
        time.sleep(300)
    return work

if __name__ == "__main__":
    folder, what = sys.argv[1:]
    make = partial(make_dying, folder + "/deaths", 1) if what == "dies" else partial(make_sleeping, folder)
    with session():
        print(map_shards(make, list(range(6)), options=WorkerOptions(workers=1)))
"""


def _marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)
