"""Import a published teacher as the artifact of its stage."""

import tempfile
from pathlib import Path

from infra.store.store import Store
from infra.training.loop import TrainResult
from sftok.config import TeacherConfig
from sftok.model.teacher import Teacher
from sftok.weights.artifacts import save_teacher
from sftok.weights.convert import load_published


def import_teacher(data: bytes, expected: TeacherConfig, out: Store) -> TrainResult:
    """Write the weights and config of a teacher from a published file.

    Args:
        data: bytes of the file, .bin or .safetensors.
        expected: config in the recipe.
        out: folder of the artifact.

    Raises:
        ValueError: the file is not a teacher's, is damaged, or its sizes differ from the recipe's.
    """
    is_safetensors = data[8:9] == b"{"  # after the length of the header, which is JSON
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"teacher{'.safetensors' if is_safetensors else '.bin'}")
        file.write_bytes(data)
        model = load_published(file, kind="teacher")
    assert isinstance(model, Teacher)
    ours, theirs = expected.as_json(), model.config.as_json()
    if field := next((field for field in ours if ours[field] != theirs[field]), None):
        raise ValueError(
            f"teacher.model.{field} = {ours[field]}, but the imported weights have {theirs[field]}; set it so"
        )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return TrainResult(save_teacher(model, out), {"parameters": parameters}, {})
