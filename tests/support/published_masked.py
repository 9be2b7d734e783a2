"""Convert masked generators' weights from and to the published layout (method.md 1.6), bit for bit.

Published names are those of a BERT model with a head. Queries, keys and values are separate there and fused here.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from generator.code_space import CodeSpace
from generator.config import MaskedConfig
from generator.masked import MaskedGenerator

HEADS = 16
SHOWN = 3
LAYER = "model.encoder.layer."
_OURS = (
    (r"embed\.weight", "model.embeddings.word_embeddings.weight"),
    (r"positions\.weight", "model.embeddings.position_embeddings.weight"),
    (r"type_embed\.weight", "model.embeddings.token_type_embeddings.weight"),
    (r"norm_in\.(\w+)", r"model.embeddings.LayerNorm.\1"),
    (r"blocks\.(\d+)\.attention\.qkv\.(\w+)", rf"{LAYER}\1.attention.self.{{}}.\2"),
    (r"blocks\.(\d+)\.attention\.out\.(\w+)", rf"{LAYER}\1.attention.output.dense.\2"),
    (r"blocks\.(\d+)\.norm_1\.(\w+)", rf"{LAYER}\1.attention.output.LayerNorm.\2"),
    (r"blocks\.(\d+)\.expand\.(\w+)", rf"{LAYER}\1.intermediate.dense.\2"),
    (r"blocks\.(\d+)\.contract\.(\w+)", rf"{LAYER}\1.output.dense.\2"),
    (r"blocks\.(\d+)\.norm_2\.(\w+)", rf"{LAYER}\1.output.LayerNorm.\2"),
    (r"head\.(\w+)", r"model.lm_head.\1"),
)
_PARTS = ("query", "key", "value")
_SIZES = {
    "model.embeddings.word_embeddings.weight": 2,
    "model.embeddings.position_embeddings.weight": 2,
    f"{LAYER}0.intermediate.dense.weight": 2,
    "model.lm_head.weight": 2,
}
# Older versions of transformers saved these numbers as if they were weights.
_NO_WEIGHTS = "model.embeddings.position_ids"


def published_names(ours: str) -> tuple[str, ...]:
    """Return the published names of one of our weights: a single one, or those of queries, keys and values."""
    for pattern, theirs in _OURS:
        if match := re.fullmatch(pattern, ours):
            name = match.expand(theirs)
            return tuple(name.format(part) for part in _PARTS) if "{}" in name else (name,)
    raise AssertionError(f"{ours} has no published name")


def from_published(weights: Mapping[str, Tensor], *, heads: int = HEADS) -> MaskedGenerator:
    """Build a frozen masked generator in evaluation mode, with sizes read from the weights' shapes.

    Args:
        weights: by published names; EMA weights, since those are released.
        heads: attention heads, which cannot be read from shapes.

    Raises:
        ValueError: weights are missing, unexpected or of other shapes, or the sizes fit no generator.
    """
    weights = {name: tensor for name, tensor in weights.items() if name != _NO_WEIGHTS}
    config, space = _sizes(weights, heads)
    with torch.device("meta"):
        model = MaskedGenerator(config, space)
    expected = {name: tuple(t.shape) for name, t in to_published(model).items()}
    found = {name: tuple(t.shape) for name, t in weights.items()}
    if wrong := _differences(expected, found):
        raise ValueError(f"these are not the weights of a published generator: {wrong}")
    state = {ours: torch.cat([weights[n] for n in published_names(ours)]) for ours in model.state_dict()}
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()


def to_published(model: MaskedGenerator) -> dict[str, Tensor]:
    """Return a masked generator's weights by their published names."""
    weights: dict[str, Tensor] = {}
    for ours, tensor in model.state_dict().items():
        names = published_names(ours)
        weights |= dict(zip(names, tensor.chunk(len(names)), strict=True))
    return weights


def _sizes(weights: Mapping[str, Tensor], heads: int) -> tuple[MaskedConfig, CodeSpace]:
    """Read the sizes of the network and of its codes from the weights' shapes."""
    for name, axes in _SIZES.items():
        if name not in weights or weights[name].ndim != axes:
            raise ValueError(f"no {name} with {axes} axes among the weights, which sizes are read from")
    words, positions, hidden, head = (weights[name].shape for name in _SIZES)
    layers = 1 + max(int(match[1]) for n in weights if (match := re.match(rf"{re.escape(LAYER)}(\d+)\.", n)))
    # The embedding table has the codes, the mask, the classes and the null class.
    space = CodeSpace(codebook_size=head[0], num_tokens=positions[0] - 1, num_classes=words[0] - head[0] - 2)
    if space.num_tokens < 1 or space.num_classes < 0:
        raise ValueError(
            f"{words[0]} embeddings and {positions[0]} positions fit no generator of {head[0]} codes: "
            "it has those, a mask, the classes, a null class, and a position for the class"
        )
    return MaskedConfig(width=words[1], layers=layers, heads=heads, ffn_width=hidden[0]), space


def _differences(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> str:
    """Describe the differences between two sets of weights in one line; empty if there are none."""
    common = expected.keys() & found.keys()
    sorts = {
        "missing": expected.keys() - found.keys(),
        "unexpected": found.keys() - expected.keys(),
        "misshapen": [f"{n} is {list(found[n])}, not {list(expected[n])}" for n in common if expected[n] != found[n]],
    }
    return ", ".join(f"{len(keys)} {sort} ({_some(keys)})" for sort, keys in sorts.items() if keys)


def _some(keys: Iterable[str]) -> str:
    ordered = sorted(keys)
    return ", ".join(ordered[:SHOWN]) + (f" and {len(ordered) - SHOWN} more" if len(ordered) > SHOWN else "")
