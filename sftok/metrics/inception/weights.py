"""Read the weights of the Inception network from a file, as published or as safetensors with the same names."""

import hashlib
import io
import pickle
import zipfile
from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from infra.artifacts.pretrained import PretrainedConfig, read_pretrained
from infra.store.store import Store
from sftok.config import INCEPTION_SHA256
from sftok.metrics.inception.network import Inception
from sftok.weights.pickled import fill

EXTRACTOR = "Inception 2015-12-05"
PUBLISHED_SHA256 = INCEPTION_SHA256
# Counters of training batches, which some versions of torch save with the weights; nothing reads them.
_COUNTER = ".num_batches_tracked"


def read_inception(config: PretrainedConfig, store: Store, what: str = "Inception") -> Inception:
    """Load the network with the weights that a config names, checked by their sha256.

    Raises:
        ValueError: the file is missing, has another hash, is damaged or holds other weights; one line.
    """
    return load_inception(read_pretrained(config, store, what), config.sha256, what)


def load_inception(data: bytes, sha256: str, what: str = "Inception") -> Inception:
    """Load the network from the bytes of a file.

    Args:
        data: a state dict by `torch.save`, or safetensors.
        sha256: expected hash of the file.
        what: name of the weights in errors.

    Raises:
        ValueError: the hash differs, the file is damaged, or it holds other weights; one line.
    """
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise ValueError(f"{what}: the file has sha256 {found}, {sha256} is wanted; fetch it again or correct the hash")
    state = {name: value for name, value in _state(data, what).items() if not name.endswith(_COUNTER)}
    network = Inception()
    expected = network.state_dict()
    counters = {name: value for name, value in expected.items() if name.endswith(_COUNTER)}
    broken = sorted(name for name, value in state.items() if not torch.isfinite(value).all())
    if broken:
        raise ValueError(f"{what}: NaN or infinite weights in {broken[0]}; fetch the file again")
    fill(network, {**state, **counters}, what)
    return network


def _state(data: bytes, what: str) -> dict[str, Tensor]:
    """Read the tensors of the file."""
    try:
        is_safetensors = data[8:9] == b"{"
        state = load(data) if is_safetensors else torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{what}: {_what_else(data)}; give {EXTRACTOR} as a plain state dict") from error
    except SafetensorError as error:
        raise ValueError(f"{what}: damaged safetensors ({error}); fetch the file again") from error
    # A file cut anywhere makes the unpickler raise whatever the next byte leads to: it has no error of its own.
    except Exception as error:
        raise ValueError(f"{what}: {_what_else(data)}; give {EXTRACTOR} as a plain state dict") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{what}: not a state dict of weights by name; give the file as it was published")
    return dict(state)


def _what_else(data: bytes) -> str:
    """Describe a file that is not a state dict, as far as it is recognised."""
    if zipfile.is_zipfile(io.BytesIO(data)):
        names = zipfile.ZipFile(io.BytesIO(data)).namelist()
        if any("/code/" in name for name in names):
            return "a TorchScript archive, which holds a program"
        return "it holds more than tensors, which could run code"
    return f"{len(data)} bytes that torch cannot read, damaged or another format"
