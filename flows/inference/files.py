"""Files of sampled images: a folder of pictures, a contact sheet with class names, one large array."""

import contextlib
import functools
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from pydantic import JsonValue
from torch import Tensor

from flows.evaluation.gallery import png

UNFINISHED = ".unfinished.json"  # in a folder of pictures, some of which are missing
GAP = 4  # pixels between pictures of a contact sheet


class Outputs(NamedTuple):
    """Where images are wanted; None: not there."""

    folder: Path | None = None
    sheet: Path | None = None
    npz: Path | None = None


class Part(NamedTuple):
    """A micro-batch of samples as images."""

    sample_ids: list[str]
    images: Tensor
    """uint8 (n, 3, S, S)."""


Take = Callable[[Part], None]


def check_names(outputs: Outputs) -> None:
    """Refuse names that say something else than what their files will hold.

    Raises:
        ValueError: such a name.
    """
    for option, file, suffix in (("--grid", outputs.sheet, ".png"), ("--npz", outputs.npz, ".npz")):
        if file is not None and file.suffix.lower() != suffix:
            raise ValueError(f"{option} {file} would not be read as what it is: let its name end in {suffix}")


def picture_file(folder: Path, sample_id: str) -> Path:
    """Where the picture of a sample is, below the folder of its class."""
    return folder / f"{sample_id}.png"


@contextlib.contextmanager
def writing(outputs: Outputs, *, count: int, size: int, rows: Mapping[str, Sequence[str]]) -> Iterator[Take]:
    """Take images as they come, in any order, into all files that are wanted.

    Args:
        outputs: which files.
        count: images that will come.
        size: side of an image, in pixels.
        rows: ids of the samples on the contact sheet, by the titles of its rows.
    """
    with contextlib.ExitStack() as stack:
        takers: list[Take] = []
        if outputs.folder is not None:
            takers.append(functools.partial(_write_pictures, outputs.folder))
        if outputs.sheet is not None:
            takers.append(stack.enter_context(sheet_writer(outputs.sheet, rows)))
        if outputs.npz is not None:
            takers.append(stack.enter_context(npz_writer(outputs.npz, count, size)))

        def take(part: Part) -> None:
            for each in takers:
                each(part)

        yield take


def _write_pictures(folder: Path, part: Part) -> None:
    for sample_id, image in zip(part.sample_ids, part.images, strict=True):
        if not (file := picture_file(folder, sample_id)).exists():
            write_whole(file, png(image))


def write_whole(file: Path, data: bytes) -> None:
    """Write a file that has its name once it is complete."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        partial.write_bytes(data)
        partial.rename(file)
    finally:
        partial.unlink(missing_ok=True)


def is_begun(folder: Path, settings: JsonValue) -> bool:
    """Whether pictures of these settings were begun in a folder and not finished: what is there goes on."""
    try:
        found: JsonValue = json.loads((folder / UNFINISHED).read_bytes())
    except (OSError, ValueError):
        return False
    return found == settings


@contextlib.contextmanager
def begun(folder: Path | None, settings: JsonValue) -> Iterator[None]:
    """Note in a folder what its pictures are of, as long as some are missing."""
    if folder is None:
        yield
        return
    write_whole(folder / UNFINISHED, json.dumps(settings).encode())
    yield
    (folder / UNFINISHED).unlink()


@contextlib.contextmanager
def npz_writer(file: Path, count: int, size: int) -> Iterator[Take]:
    """Write images as they come into one array `arr_0`, uint8 (count, size, size, 3), as ADM's evaluator reads it.

    The array goes into the archive piece by piece, uncompressed; the file has its name once it is complete.

    Raises:
        ValueError: it was given more or fewer images.
    """
    unfinished, written = file.with_name(f".{file.name}.{os.getpid()}.part"), 0
    try:
        # A plain ZipInfo has a fixed date: the same images are the same bytes.
        with (
            zipfile.ZipFile(unfinished, "x") as archive,
            archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as array,
        ):
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, size, size, 3)}
            np.lib.format.write_array_header_1_0(array, header)

            def take(part: Part) -> None:
                nonlocal written
                array.write(np.ascontiguousarray(part.images.permute(0, 2, 3, 1).numpy()).data)
                written += len(part.images)

            yield take
        if written != count:
            raise ValueError(f"{file}: {written} images of {count} came: delete the samples and run again")
        unfinished.rename(file)
    finally:
        unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def sheet_writer(file: Path, rows: Mapping[str, Sequence[str]]) -> Iterator[Take]:
    """Keep the images of the contact sheet as they come, and write it at the end."""
    kept: dict[str, Tensor] = {}
    shown = {sample_id for row in rows.values() for sample_id in row}

    def take(part: Part) -> None:
        kept.update((name, image) for name, image in zip(part.sample_ids, part.images, strict=True) if name in shown)

    yield take
    pictures = {title: [kept[sample_id] for sample_id in row] for title, row in rows.items()}
    write_whole(file, png(labelled_sheet(pictures)))


def labelled_sheet(rows: dict[str, list[Tensor]]) -> Tensor:
    """Rows of pictures (3, S, S), each below its title, uint8 (3, ...); a title longer than its row is cut."""
    columns, size = max(map(len, rows.values())), next(iter(rows.values()))[0].shape[-1]
    width = columns * (size + GAP) - GAP
    font = ImageFont.load_default(min(max(size // 8, 10), 24))
    above = sum(font.getmetrics()) + GAP if isinstance(font, ImageFont.FreeTypeFont) else 12 + GAP
    sheet = np.full((len(rows) * (above + size + GAP) - GAP, width, 3), 255, dtype=np.uint8)
    for row, pictures in enumerate(rows.values()):
        top = row * (above + size + GAP) + above
        for column, picture in enumerate(pictures):
            left = column * (size + GAP)
            sheet[top : top + size, left : left + size] = picture.permute(1, 2, 0).numpy()
    drawn = Image.fromarray(sheet)
    pen = ImageDraw.Draw(drawn)
    for row, title in enumerate(rows):
        shown = title
        while shown and pen.textlength(shown, font) > width:
            shown = shown.removesuffix("…")[:-1].rstrip() + "…" if len(shown) > 1 else ""
        pen.text((0, row * (above + size + GAP)), shown, fill=(0, 0, 0), font=font)
    return torch.from_numpy(np.array(drawn)).permute(2, 0, 1)
