"""Infer the config of published weights: from their shapes, from a config.json, and otherwise as published.

A config.json may be this project's or the authors' (a dump of their YAML, whose `model.vq_model` describes the
tokenizer). Fields are handled by their dotted name in this project's config.json.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import JsonValue, ValidationError

from sftok.config import BASE, LARGE, SMALL, TeacherConfig
from sftok.weights.artifacts import TeacherFile, TokenizerFile
from sftok.weights.published_names import HEAD_CHANNELS, Shapes, norm_groups, teacher_sizes, tokenizer_sizes

Kind = Literal["sftok", "teacher"]
Fields = dict[str, JsonValue]

KINDS = {"sftok": "an SFTok tokenizer", "teacher": "a teacher (MaskGIT-VQGAN)"}
_TRANSFORMERS = {"small": SMALL, "base": BASE, "large": LARGE}
# The authors' fields that weights can contradict, and ours; their other fields concern training.
_AUTHORS = {
    "model.vq_model.codebook_size": "tokenizer.codebook_size",
    "model.vq_model.token_size": "tokenizer.code_dim",
    "model.vq_model.num_latent_tokens": "tokenizer.num_latent_tokens",
    "model.vq_model.vit_enc_patch_size": "tokenizer.patch_size",
    "model.vq_model.is_legacy": "tokenizer.legacy_layout",
    "dataset.preprocessing.crop_size": "image_size",
}
_AUTHORS_SIZES = {
    "model.vq_model.vit_enc_model_size": "tokenizer.encoder",
    "model.vq_model.vit_dec_model_size": "tokenizer.decoder",
}


class StatedConfig(NamedTuple):
    """The fields of a config.json."""

    file: Path
    fields: Fields
    sources: dict[str, str]
    """name of each field in the file itself."""


def read_config(file: Path, kind: str) -> StatedConfig:
    """Read a config.json for weights of a kind.

    Raises:
        ValueError: it is neither the authors' nor this project's config of this kind.
    """
    try:
        plain = json.loads(file.read_bytes())
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"{file}: not JSON: {error}") from error
    if not isinstance(plain, dict):
        plain = {}
    if plain.keys() & {"tokenizer", "teacher"}:
        wanted = TokenizerFile if kind == "sftok" else TeacherFile
        try:
            fields = dict(_flat(wanted.model_validate(plain).as_json()))
        except ValidationError as error:
            raise ValueError(f"{file}: not the config of {KINDS[kind]}: {_first(error)}") from error
        return StatedConfig(file, fields, {field: field for field in fields})
    fields = dict(_flat(plain))
    if kind != "sftok" or not any(field.startswith("model.vq_model.") for field in fields):
        raise ValueError(f"{file}: not the config of {KINDS[kind]}, neither the authors' nor this project's")
    return _translated(file, fields)


def model_config(shapes: Shapes, kind: str, stated: StatedConfig | None) -> TokenizerFile | TeacherFile:
    """Infer the config of weights from their published names and shapes.

    Raises:
        ValueError: `stated` contradicts the shapes, sizes cannot be read from them, or they fit no model.
    """
    given = stated.fields if stated else {}
    if kind == "teacher":
        sizes = teacher_sizes(shapes)
    else:
        base = given.get("teacher.base_channels")
        sizes = tokenizer_sizes(shapes, base if isinstance(base, int) else None)
    if stated:
        for field in sorted(sizes.keys() & given.keys()):
            if sizes[field] != given[field]:
                raise ValueError(
                    f"the weights have {field} = {sizes[field]}, "
                    f"but {stated.file} says {stated.sources[field]} = {given[field]}"
                )
    return _typed({**_unwritten(sizes, given, kind), **given, **sizes}, kind)


def _translated(file: Path, theirs: Fields) -> StatedConfig:
    """Translate the authors' config to our fields."""
    sources = {ours: name for name, ours in _AUTHORS.items() if name in theirs}
    fields = {ours: theirs[name] for ours, name in sources.items()}
    for name, ours in _AUTHORS_SIZES.items():
        if name not in theirs:
            continue
        size = _TRANSFORMERS.get(str(theirs[name]))
        if size is None:
            raise ValueError(f"{file}: {name} = {theirs[name]!r} is none of {', '.join(_TRANSFORMERS)}")
        for field in ("width", "layers", "heads"):
            fields[f"{ours}.{field}"] = getattr(size, field)
            sources[f"{ours}.{field}"] = f"{name} = {theirs[name]!r}, whose {field}"
    return StatedConfig(file, fields, sources)


def _unwritten(sizes: Fields, given: Fields, kind: str) -> Fields:
    """Return the fields that neither shapes nor a config state, as published."""
    fields: Fields = {}
    if kind == "sftok":
        fields["tokenizer.legacy_layout"] = True
        for part in ("tokenizer.encoder", "tokenizer.decoder"):
            width = sizes[f"{part}.width"]
            assert isinstance(width, int)
            if width % HEAD_CHANNELS and f"{part}.heads" not in given:
                raise ValueError(
                    f"{part}.width = {width} is no multiple of {HEAD_CHANNELS}, the channels of a published head; "
                    f"give a config.json that states {part}.heads"
                )
            fields[f"{part}.heads"] = width // HEAD_CHANNELS
        if not sizes["pixels"]:
            return fields | {f"teacher.{field}": value for field, value in TeacherConfig().as_json().items()}
    base = sizes["teacher.base_channels"]
    assert isinstance(base, int)
    return fields | {"teacher.norm_groups": norm_groups(base)}


def _typed(fields: Fields, kind: str) -> TokenizerFile | TeacherFile:
    """Build the config from dotted fields."""
    plain: Fields = {}
    for field, value in fields.items():
        *parents, name = field.split(".")
        place = plain
        for parent in parents:
            below = place.setdefault(parent, {})
            assert isinstance(below, dict)
            place = below
        place[name] = value
    try:
        return TokenizerFile.model_validate(plain) if kind == "sftok" else TeacherFile.model_validate(plain)
    except ValidationError as error:
        raise ValueError(_first(error)) from error


def _flat(plain: Mapping[str, JsonValue], start: str = "") -> Iterable[tuple[str, JsonValue]]:
    """Yield the leaves of nested objects by dotted name."""
    for name, value in plain.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{start}{name}.")
        else:
            yield f"{start}{name}", value


def _first(error: ValidationError) -> str:
    """Describe the first error in a config."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}"
