"""Save and load generators: safetensors weights beside a config.json."""

from generator.config import AnyGeneratorConfig
from generator.data import space_of
from generator.kinds import build_generator
from generator.network import GeneratorNetwork
from infra.artifacts.shards import FileEntry
from infra.artifacts.weights import load_config, load_weights, save_weights
from infra.codes.contract import CodesInfo
from infra.config import Config
from infra.store.store import Store


class GeneratorFile(Config):
    """config.json of a generator."""

    generator: AnyGeneratorConfig
    codes: CodesInfo
    """info of the codes it was trained on, and therefore of its samples."""


def save_generator(model: GeneratorNetwork, info: CodesInfo, folder: Store) -> list[FileEntry]:
    """Write a generator's weights and config."""
    return save_weights(model, GeneratorFile(generator=model.config, codes=info), folder)


def load_generator(folder: Store) -> tuple[GeneratorNetwork, CodesInfo]:
    """Load a frozen generator in evaluation mode, and the info of its codes.

    Raises:
        ValueError: the config or the weights are not a generator's.
    """
    config = load_config(folder, GeneratorFile)
    model = build_generator(config.generator, space_of(config.codes))
    load_weights(model, folder)
    return model, config.codes
