"""Checkpoints of several ranks: each writes its part, and any number of ranks loads them."""

import json
import os
import shutil
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn

from infra.compute.ranks import Ranks
from infra.errors import TransientError
from infra.store.store import Store
from infra.training.checkpoint import Checkpoints, Restored
from infra.training.config import OptimizerConfig
from infra.training.learner import Learner, OptimizerPlan
from infra.training.marker import read_marker
from infra.training.parallel import own_part, shard

COUNTS = (1, 2, 4)
KINDS = ("plain", "sharded", "learner")
PAIRS = [f"{kind}-{saved}-{loaded}" for kind in KINDS for saved in COUNTS for loaded in COUNTS]
OTHERS = ["damage", "failed write", "unsendable error", "training meanwhile"]
VALUES = {
    "rows": torch.arange(5 * 6.0).view(5, 6),  # of four ranks, the last has none
    "columns": torch.arange(3 * 8.0).view(3, 8).bfloat16(),
    "by_node": torch.arange(9 * 2.0).view(9, 2),
    "whole": torch.arange(64.0).view(8, 8),
    "large": torch.arange(1000, dtype=torch.int64),
    "step": torch.tensor(7.0),
}


def test_every_rank_writes_its_part(outcomes: dict[str, list[str]], saved: Path) -> None:
    for count in COUNTS:
        marker = read_marker(Store(saved / f"sharded-{count}" / "step-000000007"))
        assert len(marker.files) == count
        sizes = [Store(saved / f"sharded-{count}" / "step-000000007").size(file) for file in marker.files]
        values = sum(tensor.nbytes for tensor in VALUES.values())
        assert values < sum(sizes) < values + 1200 * count  # headers: nothing is there twice
        assert len(marker.tensors["rows"].chunks) == min(count, 3)
        assert len(marker.tensors["by_node"].chunks) == min(count, 2)
        assert len(marker.tensors["whole"].chunks) == 1
    sizes = [path.stat().st_size for path in (saved / "plain-2" / "step-000000007").glob("*.safetensors")]
    assert max(sizes) < sum(tensor.nbytes for tensor in VALUES.values())


@pytest.mark.parametrize("case", [*PAIRS, *OTHERS])
def test_ranks_agree(case: str, outcomes: dict[str, list[str]]) -> None:
    assert outcomes[case]
    assert outcomes[case] == ["ok"] * len(outcomes[case]), "\n".join(outcomes[case])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def outcomes(saved: Path) -> dict[str, list[str]]:
    """What each rank says of each case; all are run in the same four processes."""
    multiprocessing.spawn(run_cases, (str(saved),), nprocs=max(COUNTS))
    found: dict[str, list[str]] = {}
    for file in saved.glob("outcomes-*.json"):
        for case, outcome in json.loads(file.read_text()).items():
            found.setdefault(case, []).append(outcome)
    return found


def run_cases(rank: int, folder: str) -> None:
    """Save and load as each number of ranks of which this is one."""
    torch.set_num_threads(1)
    found: dict[str, str] = {}
    cases = Cases(Path(folder))

    def record(name: str, call: Callable[[], None]) -> None:
        try:
            call()
            found[name] = "ok"
        except Exception:
            found[name] = traceback.format_exc()

    for count in COUNTS:
        with world(Path(folder), f"save-{count}", rank, count) as ranks:
            for kind in KINDS if ranks is not None else ():
                record(f"save {kind}-{count}", lambda kind=kind, ranks=ranks: cases.save(kind, ranks))
    for count in COUNTS:
        with world(Path(folder), f"load-{count}", rank, count) as ranks:
            for kind in KINDS if ranks is not None else ():
                for before in COUNTS:
                    call = lambda kind=kind, ranks=ranks, before=before: cases.load(kind, before, ranks)  # noqa: E731
                    record(f"{kind}-{before}-{count}", call)
    with world(Path(folder), "others", rank, 2) as ranks:
        if ranks is not None:
            record("damage", lambda: cases.damage(ranks))
            record("failed write", lambda: cases.failed_write(TransientError("the store is away"), ranks))
            record("unsendable error", lambda: cases.failed_write(Unsendable(), ranks))
            record("training meanwhile", lambda: cases.training_meanwhile(ranks))
    assert all(outcome == "ok" for name, outcome in found.items() if name.startswith("save")), found
    Path(folder, f"outcomes-{rank}.json").write_text(json.dumps(found))


@contextmanager
def world(folder: Path, name: str, rank: int, count: int) -> Iterator[Ranks | None]:
    """Be one of `count` ranks, or none."""
    if rank >= count:
        yield None
        return
    dist.init_process_group("gloo", init_method=f"file://{folder}/{name}", rank=rank, world_size=count)
    os.environ["LOCAL_WORLD_SIZE"] = str(min(count, 2))
    try:
        yield Ranks(rank, count)
    finally:
        dist.barrier()
        dist.destroy_process_group()


class Unsendable(Exception):
    def __reduce__(self) -> str:
        raise TypeError("this cannot be pickled")


class Cases:
    """Saves and loads below a folder, as one of several ranks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def checkpoints(self, name: str, ranks: Ranks) -> Checkpoints:
        return Checkpoints(Store(self.folder / name), keep=2, ranks=ranks)

    def save(self, kind: str, ranks: Ranks) -> None:
        tensors = state_of(kind, ranks, is_filled=True)
        with self.checkpoints(f"{kind}-{ranks.size}", ranks) as checkpoints:
            checkpoints.save(7, tensors, {"of": ranks.size})
        whole = {name: gathered(tensor) for name, tensor in tensors.items()}
        if ranks.is_first:
            torch.save(whole, self.folder / f"{kind}-{ranks.size}.pt")

    def load(self, kind: str, before: int, ranks: Ranks) -> None:
        tensors = state_of(kind, ranks, is_filled=False)
        found = self.checkpoints(f"{kind}-{before}", ranks).load_into(tensors)
        assert found == Restored(7, {"of": before})
        wanted = torch.load(self.folder / f"{kind}-{before}.pt")
        assert tensors.keys() == wanted.keys()
        for name, tensor in tensors.items():
            assert torch.equal(gathered(tensor), wanted[name]), name

    def damage(self, ranks: Ranks) -> None:
        """A part that only the last rank reads is damaged: all take the checkpoint before."""
        place = self.folder / "damaged"
        if ranks.is_first:
            shutil.copytree(self.folder / "sharded-2", place)
            shutil.copytree(self.folder / "sharded-4" / "step-000000007", place / "step-000000009")
            store = Store(place / "step-000000009")
            marker = read_marker(store)
            only = marker.tensors["rows"].chunks[-1]
            store.write(only.file, store.read(only.file)[:-1] + b"\xff")
        dist.barrier()
        rows = {"rows": state_of("sharded", ranks, is_filled=False)["rows"]}
        checkpoints = self.checkpoints("damaged", ranks)
        assert checkpoints.load_into(rows) == Restored(7, {"of": 2})
        assert torch.equal(gathered(rows["rows"]), VALUES["rows"])
        with checkpoints:
            checkpoints.save(9, rows, {})
        if ranks.is_first:
            assert len(read_marker(Store(place / "step-000000009")).tensors) == 1

    def failed_write(self, error: Exception, ranks: Ranks) -> None:
        """The second rank cannot write: the save fails on both, and leaves no marker."""
        name = type(error).__name__
        checkpoints = self.checkpoints(name, ranks)
        write = Store.write

        def fail(*_: object) -> None:
            raise error

        Store.write = fail if ranks.rank == 1 else write  # type: ignore[method-assign]
        try:
            checkpoints.save(1, state_of("plain", ranks, is_filled=True), {})
            checkpoints.wait()
        except (TransientError, RuntimeError) as raised:
            assert type(raised) is type(error) or name in str(raised)  # noqa: PT017
        else:
            raise AssertionError("nothing was raised")
        finally:
            Store.write = write  # type: ignore[method-assign]
        assert checkpoints.load_into({}) is None

    def training_meanwhile(self, ranks: Ranks) -> None:
        """Collectives of a step, in any order with those of the thread that writes."""
        checkpoints, go, write = self.checkpoints("meanwhile", ranks), threading.Event(), Store.write

        def late(self: Store, key: str, data: bytes) -> None:
            assert go.wait(30)
            write(self, key, data)

        Store.write = late  # type: ignore[assignment]
        try:
            with checkpoints:
                checkpoints.save(1, state_of("plain", ranks, is_filled=True), {})
                for step in range(50):
                    assert ranks.total(torch.tensor(float(step))) == 2 * step
                assert not self.checkpoints("meanwhile", Ranks()).load_into({})
                go.set()
                for step in range(50):
                    assert ranks.total(torch.tensor(float(step))) == 2 * step
        finally:
            Store.write = write  # type: ignore[method-assign]
        assert checkpoints.load_into({}) == Restored(1, {})


def state_of(kind: str, ranks: Ranks, *, is_filled: bool) -> dict[str, Tensor]:
    """The tensors of a kind as this rank holds them: with their values, or with others."""
    if kind == "learner":
        return learner_of(ranks, is_filled=is_filled).tensors()
    values = {name: tensor.clone() if is_filled else torch.full_like(tensor, -1) for name, tensor in VALUES.items()}
    if kind == "plain" or ranks.size == 1:
        return values
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (ranks.size,))
    nodes = init_device_mesh("cpu", (ranks.size // 2, 2))
    values["rows"] = distribute_tensor(values["rows"], mesh, [Shard(0)])
    values["columns"] = distribute_tensor(values["columns"], mesh, [Shard(1)])
    values["by_node"] = distribute_tensor(values["by_node"], nodes, [Replicate(), Shard(0)])
    return values


def learner_of(ranks: Ranks, *, is_filled: bool) -> Learner:
    """A learner whose weights several ranks share out; it has taken a step, if it is filled."""
    torch.manual_seed(0 if is_filled else 1)
    network = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 7))
    if ranks.size > 1:
        shard(network, list(network), ranks, device="cpu", by_node=True)
    learner = Learner(network, OptimizerPlan(OptimizerConfig(warmup_steps=0), 20, ranks=ranks))
    if is_filled:
        learner.backward(network(torch.ones(2, 3)).square().mean())
        learner.update(0)
    return learner


def gathered(tensor: Tensor) -> Tensor:
    return tensor if own_part(tensor) is tensor else tensor.full_tensor()  # type: ignore[attr-defined]
