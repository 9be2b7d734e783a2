"""Codes shared by ranks equal loaded ones, are held once, are copied on write, and are freed with the ranks."""

import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from infra.codes import shared
from infra.codes.contract import CodeArrays, CodeRows, load_codes, to_parquet
from infra.codes.shared import share_codes
from infra.compute.ranks import ALONE, Ranks
from infra.store.store import Store
from tests.support.codes_info import codes_info
from tests.support.process_group import process_group

INFO = codes_info(8192, 64, image_size=256)
ROWS, RANKS = 20_000, 2
NAMES = ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]


def rows(count: int, seed: int) -> CodeRows:
    random = np.random.default_rng(seed)
    codes = random.integers(0, INFO.codebook_size, (count, INFO.num_tokens)).astype(INFO.dtype)
    classes = random.integers(-1, 2, count).astype(np.int32)
    return CodeRows([f"{seed}-{i:06d}" for i in range(count)], classes, ["center"] * count, codes)


@pytest.fixture
def folder(store: Store) -> Store:
    for seed, name in enumerate(NAMES):
        store.write(name, to_parquet(INFO, rows(ROWS // 2, seed)))
    return store


def checked(folder: Store, ranks: Ranks, names: list[str]) -> dict[str, Any]:
    """Return whether a rank reads the files' codes, its private memory, and whose writes it sees."""
    info, arrays = share_codes(folder, names, ranks, "cpu")
    expected_info, expected = load_codes(folder, names)
    is_equal = info == expected_info and all(map(np.array_equal, arrays[:2], expected[:2]))
    ranks.wait()  # until all have touched every page
    private = private_bytes()
    ranks.wait()
    arrays.codes[ranks.rank] = 0  # each rank its own row
    ranks.wait()
    written = [rank for rank in range(ranks.size) if (arrays.codes[rank] == 0).all()]
    return {"equal": is_equal, "private": private, "written": written}


def private_bytes() -> int | None:
    """Return the bytes of mapped codes that are private to this process; None if nothing is mapped."""
    total, is_codes, seen = 0, False, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0] and ":" not in line.split()[0]:
            is_codes = "sftok-codes" in line
            seen |= is_codes
        elif is_codes and line.startswith(("Private_Dirty", "Private_Clean")):
            total += int(line.split()[1]) * 1024
    return total if seen else None


def work(rank: int, host: str, port: int, uri: str, names: list[str], results: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    ranks = Ranks(rank, RANKS)
    try:
        with process_group(ranks, host, port):
            results.put((rank, checked(Store(uri), ranks, names)))
    except Exception as error:  # the test looks at it
        results.put((rank, error))


def in_ranks(folder: Store, names: list[str]) -> dict[int, Any]:
    meeting = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["infra.codes.shared"])
    results = context.Queue()
    arguments = [(rank, "127.0.0.1", meeting.port, folder.uri, names, results) for rank in range(RANKS)]
    processes = [context.Process(target=work, args=each) for each in arguments]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(timeout=30)
        assert process.exitcode == 0
    return found


def test_ranks_of_a_node_hold_the_codes_once_and_cannot_disturb_each_other(folder: Store) -> None:
    found = in_ranks(folder, NAMES)
    size = ROWS * INFO.num_tokens * 2
    for rank in range(RANKS):
        assert found[rank]["equal"], rank
        assert found[rank]["private"] is not None, rank
        assert found[rank]["private"] < size / 10, rank
        assert found[rank]["written"] == [rank]


def test_alone_a_rank_loads(folder: Store) -> None:
    info, arrays = share_codes(folder, NAMES, ALONE, "cpu")
    assert info == INFO
    assert np.array_equal(arrays.codes, np.concatenate([rows(ROWS // 2, seed).codes for seed in (0, 1)]))
    assert private_bytes() is None


def test_a_damaged_file_is_named_and_nothing_hangs(folder: Store) -> None:
    folder.write(NAMES[1], folder.read(NAMES[1])[:-100])
    found = in_ranks(folder, NAMES)
    assert all(isinstance(error, Exception) for error in found.values())
    assert isinstance(found[0], ValueError)
    assert NAMES[1] in str(found[0])


def test_a_process_that_may_not_look_reads_a_copy(folder: Store, caplog: pytest.LogCaptureFixture) -> None:
    info, arrays = shared._mapped(folder, NAMES, [2**22 + 1, 3, 4])  # no such process
    assert info == INFO
    assert np.array_equal(arrays.class_id, load_codes(folder, NAMES)[1].class_id)
    assert "cannot map the codes of process" in caplog.text


@pytest.mark.parametrize("shape", [(0, 64), (3, 5)])
def test_arrays_of_any_size_can_be_mapped(shape: tuple[int, int]) -> None:
    blocks = shared._Blocks()
    array = blocks.allocate(shape, np.dtype(np.uint16))
    assert array.shape == shape
    array[:] = 7
    mapped = shared._open(os.getpid(), blocks.files[0])
    blocks.close()
    assert np.array_equal(np.frombuffer(mapped, np.uint16, array.size).reshape(shape), array)


def test_arrays_of_loaded_codes_are_those_that_were_asked_for(folder: Store) -> None:
    made: list[np.ndarray[Any, Any]] = []

    def allocate(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
        made.append(np.zeros(shape, dtype))
        return made[-1]

    _, arrays = load_codes(folder, NAMES, allocate=allocate)
    assert isinstance(arrays, CodeArrays)
    assert arrays.codes is made[0]
    assert arrays.class_id is made[1]
