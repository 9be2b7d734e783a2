"""Convert published weights to models and back: SFTok of all stages and its teacher, exactly, running no code in files.

A file is opened, its sizes are read from its shapes, every key is compared, and only then is a model filled.
"""

import os
import re
import zipfile
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from sftok.model.teacher import Teacher
from sftok.model.tokenizer import SFTok
from sftok.weights import published_names
from sftok.weights.artifacts import TeacherFile, TokenizerFile
from sftok.weights.config import KINDS, Kind, model_config, read_config
from sftok.weights.published_names import HEAD_CHANNELS, INDEX_OFFSET, NORM_GROUPS, PROXY_POSITIONS

Layout = Literal["stage_1_2", "stage_3", "teacher"]
Format = Literal["safetensors", "bin"]

PICKLED = (".bin", ".pt", ".pth")
SUFFIXES = (*PICKLED, ".safetensors")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)  # all exact in float32
CONFIG = "config.json"


class PublishedFile(NamedTuple):
    """A checked file in the published layout, whose weights are not copied yet."""

    file: Path
    tensors: dict[str, Tensor]
    """by published name; mapped from the file if its format allows."""
    config: TokenizerFile | TeacherFile

    @property
    def layout(self) -> Layout:
        """Contents of the file: a tokenizer of stages 1 and 2, one of stage 3 with pixel decoder, or a teacher."""
        if isinstance(self.config, TeacherFile):
            return "teacher"
        return "stage_3" if self.config.pixels else "stage_1_2"


def load_published(
    path: str | Path, config_json: str | Path | None = None, *, kind: Kind | None = None
) -> SFTok | Teacher:
    """Load a model with published weights, frozen, in evaluation mode, float32.

    Args:
        path: .bin (torch.save of a dict) or .safetensors, or a folder with one of them and optionally config.json.
        config_json: the authors' config or this project's. It states what shapes do not show; the default is as
            published: heads of 64 channels, the legacy layout, 32 norm groups or the most below that fit, and for a
            tokenizer without pixel decoder the published teacher.
        kind: expected contents of the file; None: any.

    Raises:
        ValueError: the file is damaged, holds anything but such weights, or contradicts its config; in one line.
    """
    return build(open_published(path, config_json, kind=kind))


def open_published(
    path: str | Path, config_json: str | Path | None = None, *, kind: Kind | None = None
) -> PublishedFile:
    """Open and check a file without copying its weights; arguments and errors are those of `load_published`."""
    file, beside = _find(Path(path).expanduser())
    config_file = Path(config_json).expanduser() if config_json else beside
    read = read_tensors(file)
    names = published_names.common_names(list(read))
    tensors = {names[name]: tensor for name, tensor in read.items()}
    found = published_names.kind_of(tensors)
    if found is None:
        native = any(".transformer.blocks." in name or name.startswith("encoder.levels.") for name in tensors)
        what = "this project's own layout, which needs no conversion" if native else "neither SFTok nor its teacher"
        raise ValueError(f"{file}: {len(tensors)} keys of {what}, such as {sorted(tensors)[0]!r}")
    if kind is not None and kind != found:
        raise ValueError(f"{file}: holds {KINDS[found]}, not {KINDS[kind]}: the kind is {found}, not {kind}")
    stated = read_config(config_file, found) if config_file else None
    try:
        config = model_config({name: tuple(tensor.shape) for name, tensor in tensors.items()}, found, stated)
        _check_keys(config, tensors)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return PublishedFile(file, tensors, config)


def build(published: PublishedFile) -> SFTok | Teacher:
    """Build the model of an opened file with copies of its weights, after which the file is no longer needed.

    Raises:
        ValueError: weights are not finite.
    """
    model = _empty(published.config)
    slots, shapes = published_names.slots(model), {name: t.shape for name, t in model.state_dict().items()}
    weights = {ours: _copied(published.tensors[slot.name]).view(shapes[ours]) for ours, slot in slots.items()}
    wrong = sorted(slots[ours].name for ours, tensor in weights.items() if not _is_finite(tensor))
    if wrong:
        raise ValueError(f"{published.file}: NaN or infinity in {len(wrong)} weights, such as {wrong[0]}")
    model.load_state_dict(weights, strict=True, assign=True)
    assert not any(tensor.is_meta for tensor in chain(model.parameters(), model.buffers()))
    return model.requires_grad_(False).eval()


def to_published(model: SFTok | Teacher) -> dict[str, Tensor]:
    """Convert weights to the published layout, on the CPU, sharing the model's memory; `load_published` inverts it."""
    state = model.state_dict()
    tensors = {
        slot.name: state[ours].detach().cpu().reshape(slot.shape).contiguous()
        for ours, slot in published_names.slots(model).items()
    }
    return tensors if isinstance(model, Teacher) else {**tensors, INDEX_OFFSET: torch.zeros(1, dtype=torch.int64)}


def published_caveats(model: SFTok | Teacher) -> list[str]:
    """List the settings that the published code needs, or lacks, to compute the same from `to_published`."""
    teacher = model.config if isinstance(model, Teacher) else model.teacher_config
    caveats = []
    if isinstance(model, SFTok):
        if not model.config.legacy_layout:
            caveats.append("the encoder's output is not in the legacy layout: set is_legacy to false")
        for part, config in (("encoder", model.config.encoder), ("decoder", model.config.decoder)):
            channels = config.width // config.heads
            if channels != HEAD_CHANNELS:
                caveats.append(f"heads of the {part} have {channels} channels, published ones {HEAD_CHANNELS}")
    if (isinstance(model, Teacher) or model.pixel_decoder is not None) and teacher.norm_groups != NORM_GROUPS:
        caveats.append(f"group norms have {teacher.norm_groups} groups, published ones {NORM_GROUPS}")
    return caveats


def config_file_of(model: SFTok | Teacher) -> TokenizerFile | TeacherFile:
    """Make the config.json of a model."""
    if isinstance(model, Teacher):
        return TeacherFile(teacher=model.config)
    pixels = model.pixel_decoder is not None
    return TokenizerFile(
        tokenizer=model.config, teacher=model.teacher_config, image_size=model.image_size, pixels=pixels
    )


def _check_keys(config: TokenizerFile | TeacherFile, tensors: Mapping[str, Tensor]) -> None:
    """Compare all keys, shapes and types with those of the model that `config` describes."""
    if isinstance(config, TokenizerFile):
        factor = config.teacher.downsample_factor
        given = tensors[PROXY_POSITIONS].shape[0] - 1
        if given != (config.image_size // factor) ** 2 and not config.pixels:
            raise ValueError(
                f"{given} proxy positions of a {config.image_size} px image do not fit a teacher that divides the side "
                f"by {factor}; give a config.json that describes the teacher"
            )
    expected = {slot.name: slot.shape for slot in published_names.slots(_empty(config)).values()}
    if isinstance(config, TokenizerFile):
        expected[INDEX_OFFSET] = (1,)
    wrong = published_names.differences(expected, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    if wrong:
        raise ValueError(f"{wrong} of {len(expected)} keys")
    for name, tensor in tensors.items():
        if name == INDEX_OFFSET:
            if tensor.item() != 0:
                raise ValueError(f"{name} = {tensor.item()}: codebooks of several groups are not supported")
        elif tensor.dtype not in FLOATS or tensor.layout != torch.strided:
            raise ValueError(f"{name} is {tensor.dtype}, {tensor.layout}; dense {', '.join(map(str, FLOATS))} are read")


def _copied(tensor: Tensor) -> Tensor:
    """Copy to float32, without sharing the file's memory."""
    return tensor.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.stack(tensor.aminmax()).isfinite().all())  # one pass, no mask in memory; a NaN becomes an extreme


def _empty(config: TokenizerFile | TeacherFile) -> SFTok | Teacher:
    """Make a model on the meta device."""
    with torch.device("meta"):
        if isinstance(config, TeacherFile):
            return Teacher(config.teacher)
        return SFTok(config.tokenizer, config.teacher, config.image_size, pixels=config.pixels)


# --- files -----------------------------------------------------------------------------------------------------------


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read the tensors of a file by name, memory-mapped if possible; no code in it is run.

    Raises:
        ValueError: it cannot be read, or holds anything else.
    """
    read = _read_pickled(file) if file.suffix in PICKLED else _read_safetensors(file)
    if not isinstance(read, Mapping) or not read:
        raise ValueError(f"{file}: not a dict of weights by name; give the file as it was published")
    for name, value in read.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{file}: {name!r} is no weight but {type(value).__name__}; give a plain state dict")
    return dict(read)


def save_tensors(tensors: Mapping[str, Tensor], file: Path, format: Format) -> None:
    """Write tensors to a new file, readable by `read_tensors`, and by safetensors or torch.load."""
    partial = file.with_name(f".{file.name}.partial")
    try:
        if format == "bin":
            torch.save(dict(tensors), partial)
        else:
            safetensors.torch.save_file(dict(tensors), partial, metadata={"format": "pt"})
        partial.rename(file)
    finally:
        partial.unlink(missing_ok=True)


def _find(path: Path) -> tuple[Path, Path | None]:
    """Find the file of weights at a path, and the config beside it if the path is a folder."""
    if not path.is_dir():
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
        if path.suffix not in SUFFIXES:
            raise ValueError(f"{path}: not a file of weights; give one that ends in {', '.join(SUFFIXES)}")
        if not os.access(path, os.R_OK):
            raise ValueError(f"{path}: may not be read; change its permissions")
        return path, None
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise ValueError(f"{path}: one file of weights ({', '.join(SUFFIXES)}) is wanted, there are: {found}; name it")
    config = path / CONFIG
    return files[0], config if config.is_file() else None


def _read_pickled(file: Path) -> object:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    # A cut file makes the unpickler raise whatever the next byte leads to: it has no error of its own.
    except Exception as error:
        if foreign := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"{file}: holds more than weights ({foreign[1]}), which could run code and was not unpickled; "
                "give a plain state dict or .safetensors"
            ) from error
        raise ValueError(f"{file}: damaged, cut short or not written by torch.save; fetch it again") from error


def _read_safetensors(file: Path) -> object:
    try:
        return safetensors.torch.load_file(file)
    except SafetensorError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file}: damaged, cut short or no safetensors ({reason}); fetch it again") from error
