"""Pretrained weights: how a recipe names them, and how they are located and checked by their hash."""

import hashlib
from typing import Annotated

from pydantic import Field

from infra.config import RUNTIME, Config
from infra.store.store import Store

WEIGHTS_ROOT = "weights"


class PretrainedConfig(Config):
    """Location and SHA-256 of pretrained weights; only the hash is part of an artifact's identity."""

    uri: Annotated[str, RUNTIME] = Field(
        "", description="file, folder or s3:// URI; empty: the store's own weights/{sha256}"
    )
    sha256: str = Field("", pattern=r"^([0-9a-f]{64})?$", description="of the file; empty: no weights are given")

    @property
    def is_given(self) -> bool:
        """Tell whether weights are named."""
        return bool(self.sha256)


def read_pretrained(config: PretrainedConfig, store: Store, what: str) -> bytes:
    """Read a file of weights from `config.uri`, or else from the store, and check its SHA-256.

    Args:
        config: where to look; a folder is searched for a file with that hash.
        store: the run's store, whose `weights/{sha256}/` is used if no URI is given.
        what: the weights' name in errors, such as "LPIPS (fine_tune.lpips)".

    Raises:
        ValueError: no weights are given, the file is missing, or its hash differs; one line with the remedy.
    """
    if not config.is_given:
        raise ValueError(f"{what}: no weights are given; set its sha256 and uri")
    files = _files(config.uri) if config.uri else _files(store.at(WEIGHTS_ROOT, config.sha256).uri)
    for folder, name in files:
        data = folder.read(name)
        sha256 = hashlib.sha256(data).hexdigest()
        if sha256 == config.sha256:
            return data
        if len(files) == 1:
            raise ValueError(f"{what}: {folder.uri}/{name} has sha256 {sha256}, {config.sha256} is wanted")
    raise _missing(config, store, what)


def check_pretrained(config: PretrainedConfig, store: Store, what: str) -> None:
    """Check that there is a file where `read_pretrained` looks; it is not read.

    Raises:
        ValueError: there is none; one line with the remedy.
    """
    if not _files(config.uri or store.at(WEIGHTS_ROOT, config.sha256).uri):
        raise _missing(config, store, what)


def _missing(config: PretrainedConfig, store: Store, what: str) -> ValueError:
    where = config.uri or store.at(WEIGHTS_ROOT, config.sha256).uri
    return ValueError(f"{what}: no file of sha256 {config.sha256} in {where}; put it there, or correct uri or sha256")


def _files(uri: str) -> list[tuple[Store, str]]:
    """List the file that `uri` names, or the files of the folder that it names."""
    parent, name = Store.beside(uri)
    if name and parent.exists(name):
        return [(parent, name)]
    folder = Store(uri)
    return [(folder, info.key) for info in sorted(folder.scan()) if not (info.is_folder or info.problem)]
