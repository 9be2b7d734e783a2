"""A recipe's imported teacher is the published file's, or an error that names the field."""

import io

import pytest
import torch
from safetensors.torch import save

from infra.store.store import Store
from sftok.model.teacher import Teacher
from sftok.weights.artifacts import load_teacher
from sftok.weights.convert import to_published
from sftok.weights.import_teacher import import_teacher
from tests.support.tiny_tokenizer import TEACHER


def published() -> tuple[Teacher, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = Teacher(TEACHER)
    return model, to_published(model)


def as_bin(tensors: dict[str, torch.Tensor]) -> bytes:
    file = io.BytesIO()
    torch.save(tensors, file)
    return file.getvalue()


@pytest.mark.parametrize("write", [as_bin, save], ids=["bin", "safetensors"])
def test_the_weights_are_the_files(write, store: Store) -> None:
    model, tensors = published()
    expected = TEACHER.model_copy(update={"norm_groups": 8})  # 32, or the most below that divide the channels
    result = import_teacher(write(tensors), expected, store)
    assert result.counts["parameters"] == sum(p.numel() for p in model.parameters())
    loaded = load_teacher(store)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_another_size_than_the_recipes_is_refused(store: Store) -> None:
    _, tensors = published()
    with pytest.raises(ValueError, match=r"teacher\.model\.codebook_size = 64, but the imported weights have 32"):
        import_teacher(save(tensors), TEACHER.model_copy(update={"norm_groups": 8, "codebook_size": 64}), store)
    assert store.list() == []
