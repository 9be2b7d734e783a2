"""Share code Parquet in memory between the ranks of a node: one rank loads it, the others map its memory.

The memory is anonymous: it has no name in any file system and no size limit but the machine's (a container's /dev/shm
is often 64 MB), and it is freed when the last process that maps it ends, however it ends. Needs Linux; elsewhere, and
where a process may not open another's files, each rank loads its own copy.
"""

import hashlib
import logging
import mmap
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from infra.codes.contract import CodeArrays, CodesInfo, load_codes, load_info
from infra.compute.ranks import Ranks
from infra.store.store import Store

log = logging.getLogger(__name__)


def share_codes(folder: Store, names: Sequence[str], ranks: Ranks, device: str) -> tuple[CodesInfo, CodeArrays]:
    """Load codes as `load_codes` does, once per node; every rank must call this, and a single rank just loads.

    Writes to the arrays are private to a rank (copy-on-write, by page).

    Args:
        folder: holds the files.
        names: the files to load.
        ranks: the ranks that load together.
        device: where the ranks' tensors are summed.

    Raises:
        ValueError: a file is damaged, or from another tokenizer or other settings; names the file.
    """
    if ranks.size == 1 or sys.platform != "linux":
        return load_codes(folder, names)
    nodes = _gather([_node()], ranks, device)
    leader = nodes.index(nodes[ranks.rank])
    blocks = _Blocks()
    try:
        if ranks.rank == leader:
            load_codes(folder, names, allocate=blocks.allocate)
        shared = _gather([os.getpid(), *blocks.files] if blocks.files else [0, 0, 0], ranks, device)[leader]
        mapped = _mapped(folder, names, shared)
        ranks.wait()  # the leader's files stay open until all have mapped them
        return mapped
    finally:
        blocks.close()


class _Blocks:
    """Arrays in shared memory, each an unnamed file that this process holds open."""

    def __init__(self) -> None:
        self.files: list[int] = []

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Allocate an array of zeros that other processes can map."""
        size = max(1, int(np.prod(shape)) * dtype.itemsize)  # an empty file cannot be mapped
        self.files.append(os.memfd_create("sftok-codes"))
        os.ftruncate(self.files[-1], size)
        return _array(mmap.mmap(self.files[-1], size), shape, dtype)

    def close(self) -> None:
        """Close the files; mapped memory stays valid."""
        for file in self.files:
            os.close(file)
        self.files = []


def _array(memory: mmap.mmap, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """View the beginning of the memory as an array, which keeps the memory alive."""
    return np.frombuffer(memory, dtype, int(np.prod(shape))).reshape(shape)


def _mapped(folder: Store, names: Sequence[str], shared: Sequence[int]) -> tuple[CodesInfo, CodeArrays]:
    """Map the leader's arrays into this process."""
    info, (pid, codes_file, classes_file), class_type = load_info(folder, names[0]), shared, np.dtype(np.int32)
    try:
        codes, classes = _open(pid, codes_file), _open(pid, classes_file)
    except OSError as error:
        log.warning("cannot map the codes of process %d (%s): loading a copy", pid, error.strerror)
        return load_codes(folder, names)
    rows = len(classes) // class_type.itemsize
    return info, CodeArrays(
        _array(codes, (rows, info.num_tokens), info.dtype), _array(classes, (rows,), class_type), None, None
    )


def _open(pid: int, number: int) -> mmap.mmap:
    """Map a file of another process, copy-on-write."""
    file = os.open(f"/proc/{pid}/fd/{number}", os.O_RDONLY)
    try:
        return mmap.mmap(file, 0, access=mmap.ACCESS_COPY)
    finally:
        os.close(file)


def _node() -> int:
    """Return a number that identifies this machine, and on it the container (its process namespace)."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    name = f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


def _gather(mine: Sequence[int], ranks: Ranks, device: str) -> list[Any]:
    """Gather every rank's numbers, in rank order; if each has only one, as a flat list."""
    table = torch.zeros(ranks.size, len(mine), dtype=torch.int64, device=device)
    table[ranks.rank] = torch.tensor(mine, dtype=torch.int64)
    rows: list[Any] = ranks.total(table).tolist()
    return [row[0] for row in rows] if len(mine) == 1 else rows
