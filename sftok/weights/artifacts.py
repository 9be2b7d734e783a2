"""Save and load teachers and tokenizers in the store: safetensors with a config.json."""

from infra.artifacts.shards import FileEntry
from infra.artifacts.weights import load_config, load_weights, save_weights
from infra.config import Config
from infra.store.store import Store
from sftok.config import TeacherConfig, TokenizerConfig
from sftok.model.teacher import Teacher
from sftok.model.tokenizer import SFTok


class TeacherFile(Config):
    """config.json of a teacher."""

    teacher: TeacherConfig


class TokenizerFile(Config):
    """config.json of a tokenizer."""

    tokenizer: TokenizerConfig
    teacher: TeacherConfig
    image_size: int
    pixels: bool
    """whether it has a pixel decoder of its own (after fine-tuning)."""


def save_teacher(model: Teacher, folder: Store) -> list[FileEntry]:
    """Write a teacher's weights and config."""
    return save_weights(model, TeacherFile(teacher=model.config), folder)


def save_tokenizer(model: SFTok, folder: Store) -> list[FileEntry]:
    """Write a tokenizer's weights and config."""
    config = TokenizerFile(
        tokenizer=model.config,
        teacher=model.teacher_config,
        image_size=model.image_size,
        pixels=model.pixel_decoder is not None,
    )
    return save_weights(model, config, folder)


def load_teacher(folder: Store) -> Teacher:
    """Load a teacher, frozen and in evaluation mode.

    Raises:
        ValueError: the config or the weights are not a teacher's.
    """
    config = load_config(folder, TeacherFile)
    model = Teacher(config.teacher)
    load_weights(model, folder)
    return model


def load_tokenizer(folder: Store) -> SFTok:
    """Load a tokenizer, frozen and in evaluation mode.

    Raises:
        ValueError: the config or the weights are not a tokenizer's.
    """
    config = load_config(folder, TokenizerFile)
    model = SFTok(config.tokenizer, config.teacher, config.image_size, pixels=config.pixels)
    load_weights(model, folder)
    return model
