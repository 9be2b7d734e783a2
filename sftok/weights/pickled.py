"""Read state dicts from published files without running code, with one-line errors if they do not fit."""

import io
import pickle
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

SHOWN = 3  # names that an error lists


def read_state(data: bytes, what: str) -> dict[str, Tensor]:
    """Read a state dict that was written by `torch.save`.

    Args:
        data: bytes of the file.
        what: name of the weights in errors, such as "LPIPS (fine_tune.lpips)".

    Raises:
        ValueError: the file is damaged, holds objects besides tensors, or is no state dict.
    """
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{what}: damaged, or it holds more than tensors, which could run code; give a plain state dict"
        ) from error
    # A file cut anywhere makes the unpickler raise whatever the next byte leads to: it has no error of its own.
    except Exception as error:
        raise ValueError(f"{what}: {len(data)} bytes that torch cannot read; fetch the file again") from error
    if not isinstance(state, Mapping) or not all(_is_weight(name, value) for name, value in state.items()):
        raise ValueError(f"{what}: not a state dict of weights by name; give the file as it was published")
    return dict(state)


def _is_weight(name: object, value: object) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor) and value.is_floating_point()


def fill(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Copy all weights of `module` from `state`, which must hold these and no others.

    Raises:
        ValueError: weights are missing, unexpected or of another shape; `module` is then unchanged.
    """
    expected = module.state_dict()
    wrong = {
        "missing": expected.keys() - state.keys(),
        "unexpected": state.keys() - expected.keys(),
        "of another shape": {n for n in expected.keys() & state.keys() if expected[n].shape != state[n].shape},
    }
    reasons = [f"{reason}: {_some(names)}" for reason, names in wrong.items() if names]
    if reasons:
        raise ValueError(f"{what}: other weights than this network's ({'; '.join(reasons)})")
    module.load_state_dict(state)


def _some(names: Iterable[str]) -> str:
    """List the first names and the number of others."""
    ordered = sorted(names)
    more = f" and {len(ordered) - SHOWN} more" if len(ordered) > SHOWN else ""
    return ", ".join(ordered[:SHOWN]) + more
