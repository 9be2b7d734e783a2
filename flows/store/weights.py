"""Published weights into the store, and models of the store out as files."""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import JsonValue
from torch import Tensor

from infra.artifacts.lineage import resolve, store_of
from infra.artifacts.manifest import ArtifactRef, Manifest, Plan, find, folder_of, publish, ref_of, verify
from infra.artifacts.weights import CONFIG
from infra.settings import Settings
from infra.store.store import Store
from sftok.model.teacher import Teacher
from sftok.model.tokenizer import SFTok
from sftok.weights.artifacts import TeacherFile, load_teacher, load_tokenizer, save_teacher, save_tokenizer
from sftok.weights.config import Kind
from sftok.weights.convert import (
    Format,
    Published,
    build,
    config_file_of,
    open_published,
    published_caveats,
    save_tensors,
    to_published,
)
from sftok.weights.layout import size_name

ExportLayout = Literal["published", "native"]

ARTIFACTS = {"sftok": "tokenizer", "teacher": "teacher"}
"""Kinds of artifacts by kinds of weights."""
FILES: dict[Format, str] = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}
VERSION = 1  # raised by hand when the same file gives another artifact
LAYOUTS = {"stage_1_2": "stages 1 and 2, without pixel decoder", "stage_3": "stage 3, with pixel decoder"}


class Imported(NamedTuple):
    """Weights that are an artifact now."""

    file: str
    ref: ArtifactRef
    state: str
    """Completed, or Cached where they were imported before."""
    size: str
    """S, B or L; what it is in a few words for any other."""
    layout: str
    keys: int
    parameters: int

    def as_json(self) -> dict[str, JsonValue]:
        """One flat object; `ref` is kind/digest."""
        return {**self._asdict(), "ref": str(self.ref), "uri": self.ref.uri}


class Exported(NamedTuple):
    """A model that is files now."""

    ref: ArtifactRef
    layout: ExportLayout
    files: tuple[str, ...]
    parameters: int
    caveats: tuple[str, ...]
    """what the published code has to be told."""

    def as_json(self) -> dict[str, JsonValue]:
        """One flat object; `ref` is kind/digest."""
        return {**self._asdict(), "ref": str(self.ref), "files": list(self.files), "caveats": list(self.caveats)}


class Found(NamedTuple):
    """An artifact that somebody named."""

    store: Store
    manifest: Manifest

    @property
    def ref(self) -> ArtifactRef:
        """How stages name it."""
        return ref_of(self.store, self.manifest)

    @property
    def folder(self) -> Store:
        """Where its files are."""
        return folder_of(self.store, self.manifest.kind, self.manifest.digest)


def find_artifact(text: str, store: str | None, *kinds: str) -> Found:
    """The artifact of one of the kinds that `text` names; a full URI brings its store along.

    Raises:
        ValueError: there is none, more than one, or it is of another kind.
    """
    place = store_of(text, store)
    manifest = resolve(place, text)
    if manifest.kind not in kinds:
        raise ValueError(f"{text!r} is {manifest.kind}/{manifest.digest}, where a {' or a '.join(kinds)} is wanted")
    return Found(place, manifest)


def import_weights(path: str, *, kind: Kind, store: str | None, config_json: str | None = None) -> Imported:
    """Publish a file of published weights as an artifact; what was imported before is found by the file's hash.

    Raises:
        ValueError: `sftok.weights.convert` refuses the file, or the store cannot be used.
    """
    started, place = time.monotonic(), Store(store or Settings().store)
    opened = open_published(path, config_json, kind=kind)
    place.check()
    plan = Plan(kind=ARTIFACTS[kind], version=VERSION, config=_identity(opened))
    manifest, state = find(place, plan), "Cached"
    if manifest is None:
        model, state, folder = build(opened), "Completed", folder_of(place, plan.kind, plan.digest)
        files = save_teacher(model, folder) if isinstance(model, Teacher) else save_tokenizer(model, folder)
        counts = {"parameters": _parameters(model)}
        seconds = time.monotonic() - started
        manifest = publish(place, plan, files=files, counts=counts, metrics={}, seconds=seconds)
    layout = LAYOUTS.get(opened.layout, opened.layout)
    parameters = manifest.counts["parameters"]
    ref = ref_of(place, manifest)
    return Imported(str(opened.file), ref, state, _size(opened), layout, len(opened.tensors), parameters)


def export_weights(
    ref: str, folder: str, *, layout: ExportLayout, store: str | None, format: Format = "safetensors"
) -> Exported:
    """Write a tokenizer or a teacher of the store into a folder: its weights, then config.json.

    Raises:
        ValueError: there is no such artifact, its files are damaged, or there are such files in the folder.
    """
    found, target = find_artifact(ref, store, *ARTIFACTS.values()), Path(folder).expanduser()
    weights, config = target / FILES[format], target / CONFIG
    verify(found.store, found.manifest)
    model = load_teacher(found.folder) if found.manifest.kind == "teacher" else load_tokenizer(found.folder)
    new_files([weights, config])
    save_tensors(_tensors(model, layout), weights, format)
    config.write_text(json.dumps(config_file_of(model).as_json(), indent=1))
    caveats = tuple(published_caveats(model)) if layout == "published" else ()
    return Exported(found.ref, layout, (str(weights), str(config)), _parameters(model), caveats)


def new_files(files: Sequence[Path]) -> None:
    """Make the folders of files that are to be written; nothing is overwritten.

    Raises:
        ValueError: one of the files exists, or its folder cannot be made.
    """
    for file in files:
        if file.exists():
            raise ValueError(f"{file} exists: name another folder, or remove it")
    for folder in {file.parent for file in files}:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{folder} cannot be made a folder ({error.strerror}): name another one") from error
        if not os.access(folder, os.W_OK):
            raise ValueError(f"{folder} cannot be written to: name another folder")


def _identity(opened: Published) -> dict[str, JsonValue]:
    """What decides the artifact: the file, and what was understood of it (a config.json may say more than shapes)."""
    with opened.file.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"imported": digest, "layout": opened.layout, "model": opened.config.as_json()}


def _size(opened: Published) -> str:
    if isinstance(opened.config, TeacherFile):
        teacher = opened.config.teacher
        return f"{teacher.codebook_size} codes of {teacher.latent_channels} channels, f{teacher.downsample_factor}"
    tokenizer = opened.config.tokenizer
    widths = (tokenizer.encoder.width, tokenizer.encoder.layers, tokenizer.decoder.width, tokenizer.decoder.layers)
    other = "none of S, B, L: encoder {} x {}, decoder {} x {}".format(*widths)
    return size_name(tokenizer) or other


def _tensors(model: SFTok | Teacher, layout: ExportLayout) -> dict[str, Tensor]:
    if layout == "published":
        return to_published(model)
    return {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}


def _parameters(model: SFTok | Teacher) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
