import subprocess
import sys

import pytest
import torch

from infra.store.store import Store
from infra.training.checkpoint import MARKER, Checkpoints


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {
        "weight": torch.full((3, 2), value).t(),  # not contiguous
        "step": torch.tensor(value),
        "half": torch.full((2,), value, dtype=torch.bfloat16),
        "count": torch.tensor([2**40 + 1]),
    }


@pytest.fixture(params=["store", pytest.param("s3_store", marks=pytest.mark.s3)])
def folder(request: pytest.FixtureRequest) -> Store:
    place: Store = request.getfixturevalue(request.param)
    return place.at("run", "checkpoints")


def test_comes_back_bit_by_bit(folder: Store) -> None:
    assert Checkpoints(folder).latest() is None
    state = {"lines": [{"step": 1.0, "loss": 0.1 + 0.2}], "none": None, "inf": float("inf")}
    Checkpoints(folder).save(7, tensors(0.1), state)
    found = Checkpoints(folder).latest()
    assert found is not None
    assert (found.step, found.state) == (7, state)
    assert found.tensors.keys() == tensors(0).keys()
    for name, tensor in tensors(0.1).items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor)


def test_only_the_newest_stay(folder: Store) -> None:
    checkpoints = Checkpoints(folder, keep=2)
    for step in (9, 10, 100):
        checkpoints.save(step, tensors(step), {})
    assert sorted({key.partition("/")[0] for key in folder.list()}) == ["step-000000010", "step-000000100"]
    found = checkpoints.latest()
    assert found is not None
    assert found.step == 100
    checkpoints.clear()
    assert checkpoints.latest() is None
    assert folder.list() == []


def test_without_its_marker_it_is_not_there(store: Store) -> None:
    checkpoints = Checkpoints(store, keep=2)
    checkpoints.save(1, tensors(1), {})
    checkpoints.save(2, tensors(2), {})
    store.delete(f"step-000000002/{MARKER}")
    found = checkpoints.latest()
    assert found is not None
    assert found.step == 1


@pytest.mark.parametrize("damage", ["bytes", "gone", "marker"])
def test_a_damaged_one_is_passed_with_a_warning_and_replaced(
    store: Store, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(store, keep=2)
    checkpoints.save(1, tensors(1), {})
    checkpoints.save(2, tensors(2), {})
    file = next(key for key in store.list("step-000000002/") if key.endswith(".safetensors"))
    if damage == "bytes":
        store.write(file, store.read(file)[:-1] + b"\xff")
    elif damage == "gone":
        store.delete(file)
    else:
        store.write(f"step-000000002/{MARKER}", b"{")
    found = checkpoints.latest()
    assert found is not None
    assert found.step == 1
    assert "step-000000002" in caplog.text

    checkpoints.save(2, tensors(2.5), {})
    again = Checkpoints(store).latest()
    assert again is not None
    assert again.step == 2
    assert torch.equal(again.tensors["step"], torch.tensor(2.5))


def test_a_damaged_one_ahead_does_not_outlive_the_next_save(store: Store) -> None:
    checkpoints = Checkpoints(store, keep=2)
    checkpoints.save(1, tensors(1), {})
    checkpoints.save(9, tensors(9), {})
    store.write(f"step-000000009/{MARKER}", b"{")
    checkpoints.latest()
    checkpoints.save(2, tensors(2), {})
    assert store.folders() == ["step-000000001", "step-000000002"]


def test_a_kill_between_data_and_marker_changes_nothing(store: Store) -> None:
    Checkpoints(store).save(1, tensors(1), {})
    script = (
        "import os, sys, torch\n"
        "from infra.store.store import Store; from infra.training.checkpoint import Checkpoints\n"
        "Store.create = lambda *a: os._exit(9)\n"
        "Checkpoints(Store(sys.argv[1])).save(2, {'a': torch.ones(3)}, {})"
    )
    assert subprocess.run([sys.executable, "-c", script, store.uri], check=False).returncode == 9
    found = Checkpoints(store).latest()
    assert found is not None
    assert found.step == 1
    Checkpoints(store).save(2, tensors(2), {})
    assert len(store.list()) == 2  # what the killed run left behind is gone: tensors and marker of step 2 stay


def test_nothing_to_keep_is_refused(store: Store) -> None:
    with pytest.raises(ValueError, match="keep = 0"):
        Checkpoints(store, keep=0)
