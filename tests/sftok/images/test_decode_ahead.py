"""Decoding ahead: the same pixels by threads and by processes, and no process that outlives whom it works for."""

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import psutil
import pytest
from PIL import Image

from infra.errors import TransientError
from sftok.images import decode_process
from sftok.images.decode_ahead import DecodeRequest, Decoders, square_buffers
from sftok.images.decode_process import DecodeProcess
from sftok.images.preprocess import crop, resize_shorter, to_rgb
from tests.support import ROOT

SIDES = (16, 21)


def picture(number: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (20 + number, 37, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def decoders() -> Iterator[Decoders]:
    made = Decoders(2)
    yield made
    made.close()


def decoded(
    decoders: Decoders, files: list[bytes], places: list[float | None]
) -> tuple[list[str | None], list[object]]:
    buffers = square_buffers(len(files), SIDES)
    arrays = [buffer.zero_().numpy() for buffer in buffers]
    orders = [
        DecodeRequest(data, [array[at] for array in arrays], where)
        for at, (data, where) in enumerate(zip(files, places, strict=True))
    ]
    return decoders.submit(orders).reasons(), [buffer.tolist() for buffer in buffers]


def test_processes_decode_what_threads_do(decoders: Decoders) -> None:
    files = [picture(number) for number in range(11)]
    files[3], files[7] = b"", files[7][:300]
    places = [None, 0.0, 0.999, *[0.1 * number for number in range(8)]]
    found, wanted = decoded(decoders, files, places), decoded(Decoders(), files, places)
    assert found == wanted
    assert [at for at, reason in enumerate(found[0]) if reason is not None] == [3, 7]
    assert found[0][3] == "empty file"
    for at, side in enumerate(SIDES):
        for row in (0, 1, 2, 10):
            expected = crop(resize_shorter(to_rgb(files[row]), side), side, places[row])
            assert found[1][at][row] == expected.tolist()
    assert 1 <= len(decoders.pids) <= 2


def test_the_end_of_a_process_is_no_fault_of_the_image(decoders: Decoders) -> None:
    decoded(decoders, [picture(0)] * 9, [None] * 9)
    for pid in decoders.pids:
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(
        TransientError, match=r"^a process that decodes images was ended by signal 9; if memory ran out"
    ):
        decoded(decoders, [picture(0)] * 9, [None] * 9)
    assert decoded(decoders, [picture(0)] * 9, [None] * 9) == decoded(Decoders(), [picture(0)] * 9, [None] * 9)


def test_an_answer_that_was_not_read_is_never_taken_for_another_image(monkeypatch) -> None:
    made, read = Decoders(1), decode_process._read
    monkeypatch.setattr(decode_process, "_read", full)
    with pytest.raises(MemoryError):
        decoded(made, [picture(0)], [None])
    monkeypatch.setattr(decode_process, "_read", read)
    assert decoded(made, [picture(1)], [None]) == decoded(Decoders(), [picture(1)], [None])
    made.close()


def full(*_: object) -> bytes:
    raise MemoryError


def test_processes_need_neither_torch_nor_arrow() -> None:
    code = "import sys, sftok.images.decode_process; print(sorted({'torch', 'pyarrow', 'ray'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "[]\n"


def test_processes_end_with_their_decoders() -> None:
    made = Decoders(2)
    decoded(made, [picture(0)] * 9, [None] * 9)
    pids = made.pids
    assert pids
    del made
    assert not [pid for pid in pids if psutil.pid_exists(pid)]


WORKERS = """
import os, signal, sys, time
from tests.sftok.images.test_decode_ahead import Decoders, decoded, picture

signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # whoever is killed is gone at once
for moment in sys.stdin:
    if os.fork():
        continue
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    decoders = Decoders(2)
    decoded(decoders, [picture(0)] * 9, [None] * 9)
    print(os.getpid(), *decoders.pids, flush=True)
    if moment == "busy\\n":
        while True:
            decoded(decoders, [picture(0)] * 9, [None] * 9)
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def start_worker() -> Iterator[Callable[[str], list[psutil.Process]]]:
    """Starts what has decoders, as a copy of a process that has imported all that it takes; it and the decoders."""
    with subprocess.Popen(
        [sys.executable, "-c", WORKERS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
    ) as process:

        def start(moment: str) -> list[psutil.Process]:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(f"{moment}\n")
            process.stdin.flush()
            return [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]

        yield start
        process.kill()


@pytest.mark.parametrize("moment", ["idle", "busy"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_process_outlives_whom_it_decodes_for(
    number: signal.Signals, moment: str, start_worker: Callable[[str], list[psutil.Process]]
) -> None:
    worker, *processes = start_worker(moment)
    assert processes
    worker.send_signal(number)
    _, alive = psutil.wait_procs([worker, *processes], timeout=60)
    assert not alive


def test_signals_to_the_whole_group_leave_it_to_whom_it_decodes_for() -> None:
    process = DecodeProcess()
    square = np.zeros((3, 16, 16), np.uint8)
    assert process.decode(picture(0), [square]) is None
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(process.pid, number)
        time.sleep(0.1)
        assert process.decode(picture(1), [square]) is None
    process.close()
