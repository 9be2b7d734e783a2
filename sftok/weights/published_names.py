"""The layout of the authors' files (method.md 1.6): names of their weights, and sizes that follow from shapes.

Every published tensor is one of ours under another name; some have additional axes of length 1, because a linear layer
was written as a 1x1 convolution, or a codebook as a single group. Values never change.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from pydantic import JsonValue

from sftok.config import TOKENIZERS, TokenizerConfig
from sftok.model.teacher import Teacher
from sftok.model.tokenizer import SFTok

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

INDEX_OFFSET = "quantize.index_offset"  # int64 [0]: first code of each group, of which there is one
PROXY_POSITIONS = "decoder.learnable_embedding_positional_embedding"
OLD_NAMES = {"decoder.embedding_positional_embedding": PROXY_POSITIONS}
PIXELS = "pixel_decoder."  # prefix of the teacher's decoder inside a fine-tuned tokenizer
PIXEL_CODEBOOK = "pixel_quantize.embedding.weight"
HEAD_CHANNELS = 64  # of an attention head, in all published sizes
NORM_GROUPS = 32  # of the published teacher
SHOWN = 4  # keys of each sort that an error lists

_ENDS_1X1 = re.compile(r"(encoder\.conv_out|decoder\.ffn\.\d+)\.weight")
_TOKENIZER = (
    (r"encoder\.latent_tokens", "latent_tokens"),
    (r"encoder\.latent_positions", "encoder.latent_token_positional_embedding"),
    (r"encoder\.patch_positions", "encoder.positional_embedding"),
    (r"encoder\.project\.(\w+)", r"encoder.conv_out.\1"),
    (r"decoder\.latent_positions", "decoder.condition_positional_embedding"),
    (r"decoder\.proxy_positions", PROXY_POSITIONS),
    (r"decoder\.proxy_embed\.weight", "decoder.learnable_embedding.weight"),
    (r"decoder\.latent_embed\.(\w+)", r"decoder.decoder_embed.\1"),
    (r"decoder\.head\.(\d+\.\w+)", r"decoder.ffn.\1"),
    (r"(\w+)\.class_token", r"\1.class_embedding"),
    (r"(\w+)\.transformer\.norm_in\.(\w+)", r"\1.ln_pre.\2"),
    (r"(\w+)\.transformer\.norm_out\.(\w+)", r"\1.ln_post.\2"),
    (r"(\w+\.transformer)\.blocks\.(\d+)\.norm_([12]\.\w+)", r"\1.\2.ln_\3"),
    (r"(\w+\.transformer)\.blocks\.(\d+)\.attention\.qkv\.(\w+)", r"\1.\2.attn.in_proj_\3"),
    (r"(\w+\.transformer)\.blocks\.(\d+)\.attention\.out\.(\w+)", r"\1.\2.attn.out_proj.\3"),
    (r"(\w+\.transformer)\.blocks\.(\d+)\.mlp\.expand\.(\w+)", r"\1.\2.mlp.c_fc.\3"),
    (r"(\w+\.transformer)\.blocks\.(\d+)\.mlp\.contract\.(\w+)", r"\1.\2.mlp.c_proj.\3"),
    (r"quantizer\.(.+)", r"quantize.\1"),
    (r"pixel_codebook\.weight", PIXEL_CODEBOOK),
)


class Slot(NamedTuple):
    """Name and shape of one of our weights in a published file."""

    name: str
    shape: Shape


def slots(model: SFTok | Teacher) -> dict[str, Slot]:
    """Map our names of weights to published names and shapes, without the index offset."""
    config = model.config if isinstance(model, Teacher) else model.teacher_config
    levels = len(config.channel_multipliers)
    rename = _teacher_name if isinstance(model, Teacher) else _tokenizer_name
    found = {}
    for ours, tensor in model.state_dict().items():
        name, shape = rename(ours, levels), tuple(tensor.shape)
        if name == "quantize.embedding":
            shape = (1, *shape)
        elif _ENDS_1X1.fullmatch(name) and isinstance(model, SFTok):
            shape = (*shape, 1, 1)
        found[ours] = Slot(name, shape)
    return found


def _tokenizer_name(ours: str, levels: int) -> str:
    if ours.startswith(PIXELS):
        return PIXELS + _teacher_name(f"decoder.{ours.removeprefix(PIXELS)}", levels).removeprefix("decoder.")
    for pattern, name in _TOKENIZER:
        if match := re.fullmatch(pattern, ours):
            return match.expand(name)
    return ours


def _teacher_name(ours: str, levels: int) -> str:
    if ours == "codebook.weight":
        return "quantize.embedding.weight"
    if match := re.fullmatch(r"encoder\.levels\.(\d+)\.(.+)", ours):
        return f"encoder.down.{match[1]}.block.{match[2]}"
    # The published decoder is numbered by level and runs from the last to the first; ours is numbered in running order.
    if match := re.fullmatch(r"decoder\.levels\.(\d+)\.(.+)", ours):
        return f"decoder.up.{levels - 1 - int(match[1])}.block.{match[2]}"
    if match := re.fullmatch(r"decoder\.upsample\.(\d+)\.(.+)", ours):
        return f"decoder.up.{levels - 1 - int(match[1])}.upsample_conv.{match[2]}"
    return ours


def kind_of(names: Iterable[str]) -> str | None:
    """Recognise the contents of a file by its published names: "sftok", "teacher", or None for neither."""
    has = frozenset(names)
    if "latent_tokens" in has or any(name.startswith("quantize.shared_linear.") for name in has):
        return "sftok"
    return "teacher" if any(name.startswith(("encoder.down.", "decoder.up.")) for name in has) else None


def common_names(names: Sequence[str]) -> dict[str, str]:
    """Map the names in a file to those of the layout: without prefixes of wrappers, and with current spellings.

    A name whose new name exists already is kept, to be reported as unexpected.
    """
    prefix = ""
    while wrapper := next(
        (w for w in ("module.", "_orig_mod.") if names and all(n.startswith(prefix + w) for n in names)), None
    ):
        prefix += wrapper
    bare = {name: name.removeprefix(prefix) for name in names}
    taken = set(bare.values())
    return {name: OLD_NAMES[b] if OLD_NAMES.get(b, b) not in taken else b for name, b in bare.items()}


def differences(expected: Shapes, found: Shapes) -> str:
    """Describe the differences in a file's keys in one line, by counts and examples; empty if there are none."""
    common = expected.keys() & found.keys()
    misshapen = [f"{n} is {list(found[n])}, not {list(expected[n])}" for n in common if expected[n] != found[n]]
    sorts = {"missing": expected.keys() - found.keys(), "unexpected": found.keys() - expected.keys()}
    parts = [f"{len(keys)} {sort} ({_some(keys)})" for sort, keys in sorts.items() if keys]
    if misshapen:
        parts.append(f"{len(misshapen)} misshapen ({_some(misshapen)})")
    return ", ".join(parts)


def tokenizer_sizes(shapes: Shapes, base_channels: int | None = None) -> dict[str, JsonValue]:
    """Read a tokenizer's sizes from shapes, by dotted fields of its config.json.

    Args:
        shapes: of all published names.
        base_channels: the pixel decoder's, which its shapes determine up to a factor; None: the largest that fits.

    Raises:
        ValueError: weights that sizes are read from are missing or have another number of axes.
    """
    pixels = any(name.startswith(PIXELS) or name == PIXEL_CODEBOOK for name in shapes)
    axes = {"encoder.patch_embed.weight": 4, "encoder.positional_embedding": 2, "latent_tokens": 2}
    axes |= {"quantize.embedding": 3, "decoder.learnable_embedding.weight": 2, PROXY_POSITIONS: 2}
    anchors = _anchors(shapes, {**axes, PIXEL_CODEBOOK: 2} if pixels else axes)
    patch, proxy = anchors["encoder.patch_embed.weight"], anchors["decoder.learnable_embedding.weight"]
    _, codebook_size, code_dim = anchors["quantize.embedding"]
    patches = anchors["encoder.positional_embedding"][0] - 1
    side = math.isqrt(max(patches, 0))
    if side * side != patches or not patches:
        raise ValueError(f"encoder.positional_embedding has {patches} positions beside the class: not a square image's")
    sizes: dict[str, JsonValue] = {
        "tokenizer.patch_size": patch[2],
        "tokenizer.num_latent_tokens": anchors["latent_tokens"][0],
        "tokenizer.codebook_size": codebook_size,
        "tokenizer.code_dim": code_dim,
        "tokenizer.encoder.width": patch[0],
        "tokenizer.encoder.layers": _count(shapes, r"encoder\.transformer\.(\d+)\."),
        "tokenizer.decoder.width": proxy[1],
        "tokenizer.decoder.layers": _count(shapes, r"decoder\.transformer\.(\d+)\."),
        "teacher.codebook_size": proxy[0] - 1,
        "image_size": patch[2] * side,
        "pixels": pixels,
    }
    if pixels:
        sizes["teacher.latent_channels"] = anchors[PIXEL_CODEBOOK][1]
        sizes |= _levels(shapes, PIXELS, base_channels)
    return sizes


def teacher_sizes(shapes: Shapes) -> dict[str, JsonValue]:
    """Read a teacher's sizes from shapes, by dotted fields of its config.json.

    Raises:
        ValueError: weights that sizes are read from are missing or have another number of axes.
    """
    anchors = _anchors(shapes, {"encoder.conv_in.weight": 4, "quantize.embedding.weight": 2})
    codebook_size, latent_channels = anchors["quantize.embedding.weight"]
    return {
        "teacher.codebook_size": codebook_size,
        "teacher.latent_channels": latent_channels,
        **_levels(shapes, "decoder.", anchors["encoder.conv_in.weight"][0]),
    }


def norm_groups(base_channels: int) -> int:
    """Return the default groups of a teacher's norms: the published 32, or the most below that fit."""
    return max(groups for groups in range(1, NORM_GROUPS + 1) if base_channels % groups == 0)


def size_name(config: TokenizerConfig) -> str | None:
    """Return a tokenizer's size in TOKENIZERS, whatever its layout; None if it has none of them."""
    plain = config.model_copy(update={"legacy_layout": False})
    return next((name for name, known in TOKENIZERS.items() if known == plain), None)


def _levels(shapes: Shapes, prefix: str, base_channels: int | None) -> dict[str, JsonValue]:
    """Read width and depth of the teacher's decoder, whose names begin with `prefix`."""
    start = re.escape(prefix)
    levels = _count(shapes, rf"{start}up\.(\d+)\.")
    blocks = {f"{prefix}up.{level}.block.0.conv1.weight": 4 for level in range(max(levels, 1))}
    widths = [shape[0] for shape in _anchors(shapes, blocks).values()]
    base = math.gcd(*widths)
    if base_channels and all(width % base_channels == 0 for width in widths):
        base = base_channels
    multipliers: list[JsonValue] = [width // base for width in widths]
    return {
        "teacher.base_channels": base,
        "teacher.channel_multipliers": multipliers,
        "teacher.num_res_blocks": _count(shapes, rf"{start}up\.0\.block\.(\d+)\."),
    }


def _anchors(shapes: Shapes, axes: Mapping[str, int]) -> dict[str, Shape]:
    """Return the shapes that sizes are read from, checked for presence and number of axes."""
    wrong = differences({name: shapes.get(name, ()) for name in axes}, {n: s for n, s in shapes.items() if n in axes})
    wrong = wrong or ", ".join(
        f"{name} has {len(shapes[name])} axes, not {count}"
        for name, count in axes.items()
        if len(shapes[name]) != count
    )
    if wrong:
        raise ValueError(f"{wrong}, which sizes are read from")
    return {name: shapes[name] for name in axes}


def _count(shapes: Shapes, pattern: str) -> int:
    """Count the parts of a numbered name by the highest number."""
    return 1 + max((int(match[1]) for name in shapes if (match := re.match(pattern, name))), default=-1)


def _some(keys: Iterable[str]) -> str:
    ordered = sorted(keys)
    more = f" and {len(ordered) - SHOWN} more" if len(ordered) > SHOWN else ""
    return ", ".join(ordered[:SHOWN]) + more
