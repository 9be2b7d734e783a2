"""Checkpoints of one rank: complete or not there, written while training goes on; those of several: test_ranks."""

import hashlib
import json
import math
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from pydantic import JsonValue
from safetensors.torch import load, save
from torch import Tensor

from infra.errors import TransientError
from infra.store.store import Store
from infra.training.checkpoint import Checkpoints
from infra.training.marker import MARKER
from tests.support.s3_faults import Asked, FaultProxy, running_proxy
from tests.support.s3_server import S3Server


def tensors(value: float) -> dict[str, Tensor]:
    return {
        "weight": torch.full((3, 2), float(value)).t(),  # not contiguous
        "step": torch.tensor(float(value)),
        "half": torch.full((2,), value, dtype=torch.bfloat16),
        "count": torch.tensor([2**40 + 1]),
        "none": torch.empty(0, 3),
    }


class Found(NamedTuple):
    step: int
    state: dict[str, JsonValue]
    tensors: dict[str, Tensor]


def save_whole(folder: Store | Checkpoints, step: int, value: float, state: Mapping[str, JsonValue] = {}) -> None:
    """Save, and wait until it is complete."""
    checkpoints = folder if isinstance(folder, Checkpoints) else Checkpoints(folder)
    checkpoints.save(step, tensors(value), state)
    checkpoints.wait()


def latest(folder: Store | Checkpoints) -> Found | None:
    into = tensors(-1)
    restored = (folder if isinstance(folder, Checkpoints) else Checkpoints(folder)).load_into(into)
    return None if restored is None else Found(restored.step, restored.state, into)


def step_of(found: Found | None) -> int | None:
    return None if found is None else found.step


@pytest.fixture(params=["store", pytest.param("s3_store", marks=pytest.mark.s3)])
def folder(request: pytest.FixtureRequest) -> Store:
    place: Store = request.getfixturevalue(request.param)
    return place.at("run", "checkpoints")


def test_comes_back_bit_by_bit(folder: Store) -> None:
    assert latest(folder) is None
    state = {"lines": [{"step": 1.0, "loss": 0.1 + 0.2}], "none": None, "inf": float("inf")}
    save_whole(folder, 7, 0.1, state)
    found = latest(folder)
    assert found is not None
    assert (found.step, found.state) == (7, state)
    for name, tensor in tensors(0.1).items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor)


def test_the_file_is_one_that_others_read(store: Store) -> None:
    save_whole(store, 7, 0.1)
    (file,) = (key for key in store.list() if key.endswith(".safetensors"))
    found = load(store.read(file))
    assert found.keys() == {name for name, tensor in tensors(0).items() if tensor.numel()}
    assert all(torch.equal(tensor, tensors(0.1)[name]) for name, tensor in found.items())


def test_only_the_newest_stay(folder: Store) -> None:
    checkpoints = Checkpoints(folder, keep=2)
    for step in (9, 10, 100):
        checkpoints.save(step, tensors(step), {})
    checkpoints.wait()
    assert sorted({key.partition("/")[0] for key in folder.list()}) == ["step-000000010", "step-000000100"]
    assert step_of(latest(checkpoints)) == 100
    checkpoints.clear()
    assert latest(checkpoints) is None
    assert folder.list() == []


def test_without_its_marker_it_is_not_there(store: Store) -> None:
    checkpoints = Checkpoints(store, keep=2)
    save_whole(checkpoints, 1, 1)
    save_whole(checkpoints, 2, 2)
    store.delete(f"step-000000002/{MARKER}")
    assert step_of(latest(checkpoints)) == 1


def test_a_checkpoint_of_an_older_version_is_read(store: Store) -> None:
    """One file with whole tensors, whose names are in its header alone; of what had not begun there is nothing."""
    old = {name: tensor.contiguous() for name, tensor in tensors(0.5).items() if name != "half"}
    data = save(old, metadata={"format": "pt"})
    sha256 = hashlib.sha256(data).hexdigest()
    folder = store.at("step-000000005")
    folder.write(f"{sha256[:16]}.safetensors", data)
    marker = {"step": 5, "file": f"{sha256[:16]}.safetensors", "sha256": sha256, "state": {"lines": []}}
    folder.write(MARKER, json.dumps(marker, indent=1).encode())
    into = tensors(-1)
    assert Checkpoints(store).load_into(into, optional=["half"]) == (5, {"lines": []})
    assert all(torch.equal(into[name], tensor) for name, tensor in old.items())
    assert torch.equal(into["half"], tensors(-1)["half"])
    save_whole(store, 6, 0.25)
    assert store.folders() == ["step-000000006"]


@pytest.mark.parametrize("damage", ["bytes", "gone", "marker", "replaced"])
def test_a_damaged_one_is_passed_with_a_warning_and_replaced(
    store: Store, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(store, keep=2)
    save_whole(checkpoints, 1, 1)
    save_whole(checkpoints, 2, 2)
    file = next(key for key in store.list("step-000000002/") if key.endswith(".safetensors"))
    if damage == "bytes":
        store.write(file, store.read(file)[:-1] + b"\xff")
    elif damage == "gone":
        store.delete(file)
    elif damage == "replaced":
        store.write(file, save({name: tensor.contiguous() for name, tensor in tensors(3).items()}))
    else:
        store.write(f"step-000000002/{MARKER}", b"{")
    assert step_of(latest(checkpoints)) == 1
    assert "step-000000002" in caplog.text

    save_whole(checkpoints, 2, 2.5)
    again = latest(store)
    assert again is not None
    assert again.step == 2
    assert torch.equal(again.tensors["step"], torch.tensor(2.5))


def test_what_cannot_be_loaded_changes_nothing(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    save_whole(store, 1, 1)
    file = next(key for key in store.list() if key.endswith(".safetensors"))
    store.write(file, store.read(file) + b"\xff")
    into = tensors(-1)
    assert Checkpoints(store).load_into(into) is None
    assert len(caplog.records) == 1, "torch logs nothing of its own"
    assert all(torch.equal(into[name], tensor) for name, tensor in tensors(-1).items())


def test_a_damaged_one_ahead_does_not_outlive_the_next_save(store: Store) -> None:
    checkpoints = Checkpoints(store, keep=2)
    save_whole(checkpoints, 1, 1)
    save_whole(checkpoints, 9, 9)
    store.write(f"step-000000009/{MARKER}", b"{")
    latest(checkpoints)
    save_whole(checkpoints, 2, 2)
    assert store.folders() == ["step-000000001", "step-000000002"]


def test_a_second_writer_of_a_step_leaves_the_first_ones_alone(store: Store) -> None:
    save_whole(store, 1, 1)
    before = store.list()
    save_whole(store, 1, 2)
    assert store.list() == before
    found = latest(store)
    assert found is not None
    assert torch.equal(found.tensors["step"], torch.tensor(1.0))


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"weight": torch.ones(2, 4)}, "Size mismatch"),
        ({"weight": torch.ones(2, 3), "bias": torch.ones(2)}, "'bias'"),
        ({"weight": torch.ones(2, 3, dtype=torch.int64)}, "'weight' has the type F32, not I64"),
    ],
)
def test_tensors_of_another_network_are_not_loaded(
    wanted: dict[str, Tensor], said: str, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    save_whole(store, 1, 2)
    assert Checkpoints(store).load_into(wanted) is None
    assert said in caplog.text
    assert all(torch.equal(tensor, torch.ones_like(tensor)) for tensor in wanted.values())


def test_the_marker_of_another_step_is_not_believed(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    save_whole(store, 1, 1)
    for key in store.list("step-000000001/"):
        store.write(key.replace("1/", "2/"), store.read(key))
    assert step_of(latest(Checkpoints(store, keep=2))) == 1
    assert "its marker is that of step 1" in caplog.text


BOX = {"offsets": [0], "sizes": [2], "file": "0" * 16 + ".safetensors"}


def marker(tensor: Mapping[str, object] | None = None, *, file: str = "0" * 16 + ".safetensors") -> bytes:
    stored = {"dtype": "F32", "shape": [2], "chunks": [BOX], **(tensor or {})}
    return json.dumps({"step": 1, "files": {file: "0" * 64}, "tensors": {"a": stored}, "state": {}}).encode()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (marker(file="../../secret.safetensors"), "'../../secret.safetensors' is not 0000"),
        (marker(file="/etc/passwd"), "'/etc/passwd' is not 0000"),
        (json.dumps({"step": 1, "file": "../x", "sha256": "0" * 64, "state": {}}).encode(), "'../x' is not 0000"),
        (marker({"chunks": [{**BOX, "file": "../x"}]}), "not listed"),
        (marker({"shape": [10**30]}), "do not cover"),
        (marker({"shape": [2, 2]}), "number of dimensions"),
        (marker({"chunks": [{**BOX, "offsets": [10**30]}]}), "exceeds"),
        (marker({"chunks": [{**BOX, "offsets": [-1]}]}), "greater than or equal to 0"),
        (marker({"chunks": [BOX, BOX]}), "do not cover"),
        (
            marker({"shape": [3], "chunks": [BOX, {**BOX, "sizes": [1], "offsets": [0]}]}),
            "do not cover",
        ),
        (marker({"dtype": "object"}), "F64"),
        (b"[" * 100_000, "recursion"),
        (b"[]", "checkpoint.json: : Input should be"),
    ],
)
def test_a_marker_that_lies_is_refused_in_one_line(
    data: bytes, said: str, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    (store.path.parent / "secret.safetensors").write_bytes(save({"a": torch.ones(2)}))
    store.write(f"step-000000001/{MARKER}", data)
    into = {"a": torch.zeros(2)}
    assert Checkpoints(store).load_into(into) is None
    (record,) = caplog.records
    assert said in record.getMessage()
    assert "\n" not in record.getMessage()
    assert len(record.getMessage()) < 400
    assert torch.equal(into["a"], torch.zeros(2))


class Trap:
    """Says, when it is unpickled, that it was."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.place,)


def test_pickles_that_lie_beside_are_never_opened(store: Store, tmp_path: Path) -> None:
    """torch's own checkpoints are described by a pickle, `.metadata`, which a reader trusts."""
    save_whole(store, 1, 1)
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    for name in (".metadata", "__0_0.distcp", "0.metadata"):
        store.write(f"step-000000001/{name}", trap)
    assert step_of(latest(store)) == 1
    save_whole(store, 1, 1)
    assert not (tmp_path / "sprung").exists()
    pickle.loads(trap)
    assert (tmp_path / "sprung").exists(), "the trap works"


@contextmanager
def held_writes(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Hold all writes of files until the event is set."""
    go, write = threading.Event(), Store.write

    def wait(self: Store, key: str, data: bytes) -> None:
        assert go.wait(30)
        write(self, key, data)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write", wait)
        try:
            yield go
        finally:
            go.set()


def test_training_goes_on_while_a_checkpoint_is_written(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    state, checkpoints = tensors(1), Checkpoints(store)
    with held_writes(monkeypatch) as go:
        checkpoints.save(1, state, {})
        for tensor in state.values():
            tensor.zero_()
        assert store.list() == []
        go.set()
        checkpoints.save(2, tensors(2), {})  # in the same memory, so it waits
        assert f"step-000000001/{MARKER}" in store.list()
    checkpoints.wait()
    assert step_of(latest(store)) == 2
    store.delete(f"step-000000002/{MARKER}")
    save_whole(checkpoints, 1, 1)
    found = latest(store)
    assert found is not None
    assert all(torch.equal(tensor, tensors(1)[name]) for name, tensor in found.tensors.items())


def test_the_error_of_a_save_surfaces_later(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise TransientError("s3://there: does not answer")

    monkeypatch.setattr(Store, "write", full)
    checkpoints = Checkpoints(store)
    checkpoints.save(1, tensors(1), {})
    with pytest.raises(TransientError, match="does not answer"):
        checkpoints.save(2, tensors(2), {})
    checkpoints.wait()
    with pytest.raises(TransientError, match="does not answer"), checkpoints:
        checkpoints.save(3, tensors(3), {})
    with pytest.raises(KeyError, match="of the training"):
        fail_after_a_save(store)
    assert store.list() == []


def fail_after_a_save(store: Store) -> None:
    with Checkpoints(store) as checkpoints:
        checkpoints.save(3, tensors(3), {})
        raise KeyError("of the training")


def test_an_error_of_the_training_leaves_time_to_write(store: Store) -> None:
    with pytest.raises(KeyError, match="of the training"):
        fail_after_a_save(store)
    assert step_of(latest(store)) == 3


SCRIPT = """
import os, sys, torch
from infra.store.store import Store
from infra.training.checkpoint import Checkpoints
{patch}
with Checkpoints(Store(sys.argv[1])) as checkpoints:
    checkpoints.save(2, {{'a': torch.ones(3)}}, {{}})
"""


def test_a_kill_between_data_and_marker_changes_nothing(store: Store) -> None:
    save_whole(store, 1, 1)
    script = SCRIPT.format(patch="Store.create = lambda *a: os._exit(9)")
    assert subprocess.run([sys.executable, "-c", script, store.uri], check=False).returncode == 9
    assert len(store.list()) == 3
    assert step_of(latest(store)) == 1
    save_whole(store, 2, 2)
    assert len(store.list()) == 2  # what the killed run left behind is gone: tensors and marker of step 2 stay


def test_a_kill_in_the_middle_of_a_write_leaves_the_one_before(store: Store) -> None:
    save_whole(store, 1, 1)
    slow = (
        "import infra.store.disk as disk, time\n"
        "def slow(file): file.flush(); print('half', flush=True); time.sleep(60)\n"
        "disk._sync = slow"
    )
    process = subprocess.Popen([sys.executable, "-c", SCRIPT.format(patch=slow), store.uri], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"half\n"
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    assert any(unfinished.key for unfinished in store.unfinished_writes())
    assert step_of(latest(store)) == 1
    for step in (2, 3):
        save_whole(store, step, step)
    assert len(store.list()) == 2
    assert not list(store.unfinished_writes())


def test_nothing_to_keep_is_refused(store: Store) -> None:
    with pytest.raises(ValueError, match="keep = 0"):
        Checkpoints(store, keep=0)


@pytest.mark.s3
def test_a_server_that_is_away_for_a_while_delays_a_checkpoint_and_not_the_training(
    s3_env: S3Server, s3_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    back = math.inf

    def away(asked: Asked) -> str | None:
        return "reset" if asked.method == "PUT" and time.monotonic() < back else None

    proxy = FaultProxy(s3_env.endpoint, chosen=away)
    with running_proxy(proxy) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        monkeypatch.setenv("SFTOK_S3_PATIENCE", "60")
        store = Store(s3_store.uri)
        assert store.list() == []  # an endpoint that never answered is given up soon
        with Checkpoints(store) as checkpoints:
            began = time.monotonic()
            checkpoints.save(1, tensors(1), {})
            assert time.monotonic() - began < 1
            time.sleep(1)
            assert store.list() == []
            back = time.monotonic() + 1
            checkpoints.wait()
        monkeypatch.setenv("AWS_ENDPOINT_URL", s3_env.endpoint)
    assert proxy.hits["reset"] >= 2
    assert step_of(latest(s3_store)) == 1


@pytest.mark.s3
def test_a_large_file_is_uploaded_in_parts_without_a_copy(s3_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.store.s3.PART", 5 << 20)
    data = torch.arange(3 << 20, dtype=torch.int32)
    s3_store.write("whole", memoryview(data.numpy()).cast("B"))
    s3_store.write("small", memoryview(b"abc"))
    assert s3_store.read("whole") == data.numpy().tobytes()
    assert s3_store.read("small") == b"abc"
