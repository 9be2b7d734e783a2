"""A process group without Ray, for tests of what ranks do together."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from infra.compute.ranks import Ranks


@contextmanager
def process_group(ranks: Ranks, host: str, port: int) -> Iterator[None]:
    """Join the process group of all ranks, which meet at a store that somebody has opened."""
    meeting = TCPStore(host, port, is_master=False)
    dist.init_process_group("gloo", store=meeting, rank=ranks.rank, world_size=ranks.size)
    try:
        yield
    finally:
        dist.destroy_process_group()
