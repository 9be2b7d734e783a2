"""Import published weights into the store, and export models of the store as files."""

import hashlib
import json
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import JsonValue
from torch import Tensor

from flows.make import find_or_publish
from flows.outputs import new_files
from flows.stage import Result
from infra.artifacts.lineage import find_artifact
from infra.artifacts.manifest import ArtifactPlan, ArtifactRef, verify
from infra.artifacts.weights import CONFIG
from infra.store.store import Store
from sftok.model.teacher import Teacher
from sftok.model.tokenizer import SFTok
from sftok.weights.artifacts import TeacherFile, load_teacher, load_tokenizer, save_teacher, save_tokenizer
from sftok.weights.config import Kind
from sftok.weights.convert import (
    Format,
    PublishedFile,
    build,
    config_file_of,
    open_published,
    published_caveats,
    save_tensors,
    to_published,
)
from sftok.weights.published_names import size_name

ExportLayout = Literal["published", "native"]

ARTIFACTS = {"sftok": "tokenizer", "teacher": "teacher"}
"""Kind of artifact by kind of weights."""
FILES: dict[Format, str] = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}
VERSION = 1  # raised by hand when the same file gives another artifact
LAYOUTS = {"stage_1_2": "stages 1 and 2, without pixel decoder", "stage_3": "stage 3, with pixel decoder"}


class ImportResult(NamedTuple):
    """Weights that were imported: the artifact that they are now, and what was understood of the file."""

    file: str
    ref: ArtifactRef
    state: str
    """Completed, or Cached where they were imported before."""
    size: str
    """S, B or L; for any other, its sizes in a few words."""
    layout: str
    keys: int
    parameters: int

    def as_json(self) -> dict[str, JsonValue]:
        """Return one flat JSON object; `ref` is kind/digest."""
        return {**self._asdict(), "ref": str(self.ref), "uri": self.ref.uri}


class ExportResult(NamedTuple):
    """A model that was exported: the files that were written."""

    ref: ArtifactRef
    layout: ExportLayout
    files: tuple[str, ...]
    parameters: int
    caveats: tuple[str, ...]
    """settings that the published code needs for this model."""

    def as_json(self) -> dict[str, JsonValue]:
        """Return one flat JSON object; `ref` is kind/digest."""
        return {**self._asdict(), "ref": str(self.ref), "files": list(self.files), "caveats": list(self.caveats)}


def import_weights(path: str, *, kind: Kind, store: str | None, config_json: str | None = None) -> ImportResult:
    """Import a file of published weights as an artifact; a file that was imported before is cached by its hash.

    Raises:
        ValueError: `sftok.weights.convert` rejects the file, or the store cannot be used.
    """
    place = Store.usual(store)
    opened = open_published(path, config_json, kind=kind)
    place.check()

    def convert(folder: Store) -> Result:
        model = build(opened)
        files = save_teacher(model, folder) if isinstance(model, Teacher) else save_tokenizer(model, folder)
        return Result(files, {"parameters": _parameters(model)}, {})

    plan = ArtifactPlan(kind=ARTIFACTS[kind], version=VERSION, config=_identity(opened))
    weights, state = find_or_publish(place, plan, convert)
    layout = LAYOUTS.get(opened.layout, opened.layout)
    parameters = weights.manifest.counts["parameters"]
    return ImportResult(str(opened.file), weights.ref, state, _size(opened), layout, len(opened.tensors), parameters)


def export_weights(
    ref: str, folder: str, *, layout: ExportLayout, store: str | None, format: Format = "safetensors"
) -> ExportResult:
    """Export a tokenizer or a teacher of the store into a folder: its weights, then config.json.

    Raises:
        ValueError: there is no such artifact, its files are damaged, or the folder has files of these names.
    """
    found, target = find_artifact(ref, store, *ARTIFACTS.values()), Path(folder).expanduser()
    weights, config = target / FILES[format], target / CONFIG
    verify(found.store, found.manifest)
    model = load_teacher(found.folder) if found.manifest.kind == "teacher" else load_tokenizer(found.folder)
    new_files([weights, config])
    save_tensors(_tensors(model, layout), weights, format)
    config.write_text(json.dumps(config_file_of(model).as_json(), indent=1))
    caveats = tuple(published_caveats(model)) if layout == "published" else ()
    return ExportResult(found.ref, layout, (str(weights), str(config)), _parameters(model), caveats)


def _identity(opened: PublishedFile) -> dict[str, JsonValue]:
    """Return the artifact's identity: the file's hash and the model read from it (config.json adds to shapes)."""
    with opened.file.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"imported": digest, "layout": opened.layout, "model": opened.config.as_json()}


def _size(opened: PublishedFile) -> str:
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
