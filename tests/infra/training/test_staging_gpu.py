"""A checkpoint of a training on CUDA: copied into pinned memory, complete when the save returns."""

import pytest
import torch

from infra.store.store import Store
from infra.training.checkpoint import Checkpoints, Restored
from infra.training.staging import Staging


@pytest.mark.gpu
def test_what_is_saved_is_what_was_there_when_save_was_called(store: Store) -> None:
    weight, step = torch.zeros(64, 1024, 1024, device="cuda"), torch.zeros((), device="cuda")
    turned = weight[:4].permute(2, 0, 1)  # not contiguous
    with Checkpoints(store) as checkpoints:
        for number in (1, 2):
            weight.fill_(number)  # queued on the device, and so are the copies
            step.fill_(number)
            checkpoints.save(number, {"weight": weight, "step": step, "turned": turned}, {})
            weight.fill_(-1)
    into = {"weight": torch.empty_like(weight), "step": torch.empty_like(step), "turned": torch.zeros(1024, 4, 1024)}
    assert Checkpoints(store).load_into(into) == Restored(2, {})
    assert all(bool((tensor == 2).all()) for tensor in into.values())


@pytest.mark.gpu
def test_the_memory_is_pinned_and_reused() -> None:
    staging, tensors = (
        Staging(),
        {"a": torch.ones(1000, device="cuda"), "b": torch.ones(3, dtype=torch.bfloat16).cuda()},
    )
    files = []
    for _ in range(2):
        staging.copy(tensors)
        files.append(torch.frombuffer(staging.file({"a": "a", "b": "b"}), dtype=torch.uint8))
    assert files[0].data_ptr() == files[1].data_ptr()
    assert files[0].is_pinned()
