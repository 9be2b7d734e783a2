"""Save and load networks: safetensors weights beside a config.json that suffices to build the network."""

import json
from typing import TypeVar

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from infra.artifacts.shards import FileEntry, put
from infra.config import Config
from infra.store.store import Store

C = TypeVar("C", bound=Config)

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def save_weights(model: nn.Module, config: Config, folder: Store) -> list[FileEntry]:
    """Write a network's weights and the config that builds it."""
    weights = save({name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()})
    text = json.dumps(config.as_json(), indent=1)
    return [put(folder, WEIGHTS, weights), put(folder, CONFIG, text.encode())]


def load_config(folder: Store, kind: type[C]) -> C:
    """Read config.json.

    Raises:
        ValueError: it is not a config of this kind; names the file and the first invalid field.
    """
    try:
        return kind.model_validate_json(folder.read(CONFIG))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise ValueError(f"{folder.uri}/{CONFIG} is not a {kind.__name__}: {field}: {first['msg']}") from error


def load_weights(model: nn.Module, folder: Store) -> None:
    """Load a network's weights, freeze it and put it in evaluation mode.

    Raises:
        ValueError: weights are missing, unexpected, of another shape or not finite, or the file is damaged.
    """
    try:
        weights = load(folder.read(WEIGHTS))
        model.load_state_dict(weights, strict=True)
    except (RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{folder.uri}/{WEIGHTS} does not match the network that {CONFIG} describes: {reason}"
        ) from error
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{folder.uri}/{WEIGHTS}: {name} has values that are not finite: train it again")
    model.requires_grad_(False).eval()
