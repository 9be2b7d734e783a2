"""`sftok reconstruct`: encode and decode pictures with a tokenizer; write both side by side, and the codes."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from pydantic import JsonValue
from torch import Tensor

from flows.evaluation.gallery import png
from flows.outputs import new_files
from infra.artifacts.artifact import Artifact
from infra.artifacts.lineage import find_artifact
from infra.codes.contract import NO_CLASS, CodeRows, CodesInfo, to_parquet
from infra.compute.device import IEEE, default_device, use_numerics
from infra.progress import Progress, silent
from sftok.coding.decode import ImageDecoder
from sftok.coding.encode import encode_batches
from sftok.config import DecodingConfig
from sftok.images.preprocess import crop, resize_shorter, to_float, to_rgb
from sftok.metrics.functional import psnr
from sftok.model.prepared import prepare_encoder
from sftok.model.teacher import Teacher
from sftok.model.tokenizer import SFTok
from sftok.weights.artifacts import load_teacher, load_tokenizer

CODES, SHEET = "codes.parquet", "contact_sheet.png"
ON_SHEET = 64  # pictures on the contact sheet, at most
GAP = 4  # pixels between pictures
MICRO_BATCH = 1  # so that a picture's codes do not depend on the others


class ReconstructRequest(NamedTuple):
    """The pictures to reconstruct, the models, and the output folder."""

    images: Sequence[str]
    """files; the path as given is the image's id in the codes and for the decoding noise."""
    tokenizer: str
    """reference of an artifact."""
    teacher: str | None
    """reference of an artifact, for a tokenizer without pixel decoder that does not name its teacher."""
    out: Path
    decoding: DecodingConfig
    seed: int
    store: str | None


class Pair(NamedTuple):
    """A reconstructed picture."""

    image: str
    file: Path
    psnr: float
    """dB, against the resized and cropped original."""


class Reconstruction(NamedTuple):
    """The files written, and the pictures that could not be read."""

    tokenizer: str
    pairs: list[Pair]
    rejects: list[tuple[str, str]]
    """path and reason."""
    sheet: Path | None
    codes: Path | None

    def as_json(self) -> dict[str, JsonValue]:
        """Return one JSON object, with paths as strings."""
        return {
            "tokenizer": self.tokenizer,
            "images": [{"image": p.image, "file": str(p.file), "psnr": round(p.psnr, 3)} for p in self.pairs],
            "rejected": [{"image": image, "reason": reason} for image, reason in self.rejects],
            "contact_sheet": None if self.sheet is None else str(self.sheet),
            "codes": None if self.codes is None else str(self.codes),
        }


def reconstruct(request: ReconstructRequest, progress: Progress = silent) -> Reconstruction:
    """Encode and decode every readable picture; write pairs, a contact sheet and the codes into `request.out`.

    Raises:
        ValueError: the tokenizer or its teacher is not available, or a file would be overwritten.
    """
    images = list(dict.fromkeys(request.images))
    files = dict(zip(images, _names(images, request.out), strict=True))
    found = find_artifact(request.tokenizer, request.store, "tokenizer")
    use_numerics(IEEE, default_device())
    model = load_tokenizer(found.folder).to(default_device())
    teacher = _teacher(model, found, request)
    encoder = prepare_encoder(model)
    decoder = ImageDecoder(model, teacher, micro_batch=MICRO_BATCH, seed=request.seed)
    new_files([*files.values(), request.out / SHEET, request.out / CODES])
    pairs: list[Pair] = []
    rejects: list[tuple[str, str]] = []
    codes: list[Tensor] = []
    shown: list[Tensor] = []
    for done, image in enumerate(images):
        progress(done, len(images), {})
        try:
            original = read_square(image, model.image_size)
        except ValueError as error:
            rejects.append((image, str(error)))
            continue
        row = encode_batches(encoder, to_float(original)[None], "nearest", MICRO_BATCH)
        made = decoder(row, [image], request.decoding).images
        side_by_side = beside(original, made[0])
        files[image].write_bytes(png(side_by_side))
        pairs.append(Pair(image, files[image], psnr(made, original[None]).item()))
        codes.append(row)
        shown += [side_by_side] if len(shown) < ON_SHEET else []
    progress(len(images), len(images), {})
    if not pairs:
        return Reconstruction(str(found), pairs, rejects, None, None)
    (request.out / SHEET).write_bytes(png(contact_sheet(shown)))
    (request.out / CODES).write_bytes(_code_file(model, found, [pair.image for pair in pairs], torch.cat(codes)))
    return Reconstruction(str(found), pairs, rejects, request.out / SHEET, request.out / CODES)


def read_square(path: str, size: int) -> Tensor:
    """Read a picture as the tokenizer sees it: upright RGB, shorter side resized, centre-cropped, uint8 (3, S, S).

    Raises:
        ValueError: there is no such file, or it is not a picture; the message is the reason.
    """
    try:
        data = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
    return crop(resize_shorter(to_rgb(data), size), size)


def beside(left: Tensor, right: Tensor) -> Tensor:
    """Place two pictures (3, S, S) side by side with a white gap, (3, S, 2 S + gap)."""
    return torch.cat([left, left.new_full((3, left.shape[1], GAP), 255), right], dim=2)


def contact_sheet(pictures: Sequence[Tensor]) -> Tensor:
    """Arrange pictures of one size (3, H, W) in a roughly square grid, row by row, (3, ...)."""
    height, width = pictures[0].shape[1:]
    columns = min(len(pictures), math.ceil(math.sqrt(len(pictures) * height / width)))
    rows = math.ceil(len(pictures) / columns)
    sheet = pictures[0].new_full((3, rows * (height + GAP) - GAP, columns * (width + 4 * GAP) - 4 * GAP), 255)
    for index, picture in enumerate(pictures):
        top, left = index // columns * (height + GAP), index % columns * (width + 4 * GAP)
        sheet[:, top : top + height, left : left + width] = picture
    return sheet


def _teacher(model: SFTok, found: Artifact, request: ReconstructRequest) -> Teacher | None:
    """Load the teacher that decodes proxy codes to pixels; None if the tokenizer has a pixel decoder."""
    if model.pixel_decoder is not None:
        if request.teacher:
            raise ValueError(f"{found} has a pixel decoder of its own: leave out --teacher")
        return None
    if request.teacher:
        given = find_artifact(request.teacher, request.store or found.store.uri, "teacher")
    elif "teacher" in found.inputs:
        given = found.input("teacher")
    else:
        raise ValueError(f"{found} ends in proxy codes and names no teacher: give one by --teacher REF")
    teacher = load_teacher(given.folder).to(default_device())
    for field in ("codebook_size", "downsample_factor"):
        ours, theirs = getattr(model.teacher_config, field), getattr(teacher.config, field)
        if ours != theirs:
            raise ValueError(f"{given} has {field} = {theirs}, {found} was made for {ours}: give another --teacher")
    return teacher


def _names(images: Sequence[str], out: Path) -> Iterator[Path]:
    """Yield a file for each picture: its own name, numbered if that is taken."""
    taken = {Path(SHEET).stem}
    for image in images:
        stem = Path(image).stem or "image"
        name, number = stem, 2
        while name.casefold() in taken:  # some file systems do not distinguish A.png and a.png
            name, number = f"{stem}-{number}", number + 1
        taken.add(name.casefold())
        yield out / f"{name}.png"


def _code_file(model: SFTok, found: Artifact, images: list[str], codes: Tensor) -> bytes:
    info = CodesInfo(
        tokenizer=found.manifest.digest,
        codebook_size=model.config.codebook_size,
        num_tokens=model.config.num_latent_tokens,
        image_size=model.image_size,
        assignment="nearest",
        precision="fp32",
        class_names=None,
    )
    none = np.full(len(images), NO_CLASS, dtype=np.int32)
    return to_parquet(info, CodeRows(images, none, ["center"] * len(images), codes.numpy().astype(info.dtype)))
