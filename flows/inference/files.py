"""Write sampled images to files: a folder of pictures, a contact sheet with class names, one large array."""

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

UNFINISHED = ".unfinished.json"  # in a folder of pictures while some are missing
GAP = 4  # pixels between pictures of a contact sheet


class Outputs(NamedTuple):
    """Files to write images to; None: not requested."""

    folder: Path | None = None
    sheet: Path | None = None
    npz: Path | None = None


class ImageBatch(NamedTuple):
    """A micro-batch of samples, decoded."""

    sample_ids: list[str]
    images: Tensor
    """uint8 (n, 3, S, S)."""


WriteBatch = Callable[[ImageBatch], None]


def check_names(outputs: Outputs) -> None:
    """Check that file names have the suffix of what they will hold.

    Raises:
        ValueError: a name has another suffix.
    """
    for option, file, suffix in (("--grid", outputs.sheet, ".png"), ("--npz", outputs.npz, ".npz")):
        if file is not None and file.suffix.lower() != suffix:
            raise ValueError(f"{option} {file}: the name must end in {suffix}")


def picture_file(folder: Path, sample_id: str) -> Path:
    """Return the file of a sample's picture, in a subfolder for its class."""
    return folder / f"{sample_id}.png"


@contextlib.contextmanager
def image_writer(outputs: Outputs, *, count: int, size: int, rows: Mapping[str, Sequence[str]]) -> Iterator[WriteBatch]:
    """Write images to all requested files as they arrive, in any order.

    Args:
        outputs: the requested files.
        count: the number of images to expect.
        size: side of an image, in pixels.
        rows: ids of the samples on the contact sheet, by row title.
    """
    with contextlib.ExitStack() as stack:
        writers: list[WriteBatch] = []
        if outputs.folder is not None:
            writers.append(functools.partial(_write_pictures, outputs.folder))
        if outputs.sheet is not None:
            writers.append(stack.enter_context(sheet_writer(outputs.sheet, rows)))
        if outputs.npz is not None:
            writers.append(stack.enter_context(npz_writer(outputs.npz, count, size)))

        def write_batch(batch: ImageBatch) -> None:
            for write in writers:
                write(batch)

        yield write_batch


def _write_pictures(folder: Path, batch: ImageBatch) -> None:
    for sample_id, image in zip(batch.sample_ids, batch.images, strict=True):
        if not (file := picture_file(folder, sample_id)).exists():
            write_whole(file, png(image))


def write_whole(file: Path, data: bytes) -> None:
    """Write a file atomically: it has its name only when it is complete."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        partial.write_bytes(data)
        partial.rename(file)
    finally:
        partial.unlink(missing_ok=True)


def is_unfinished(folder: Path, settings: JsonValue) -> bool:
    """Return whether a folder holds an unfinished set of pictures with these settings, which can be resumed."""
    try:
        found: JsonValue = json.loads((folder / UNFINISHED).read_bytes())
    except (OSError, ValueError):
        return False
    return found == settings


@contextlib.contextmanager
def marked_unfinished(folder: Path | None, settings: JsonValue) -> Iterator[None]:
    """Mark a folder of pictures as unfinished, with its settings, until the block ends without an error."""
    if folder is None:
        yield
        return
    write_whole(folder / UNFINISHED, json.dumps(settings).encode())
    yield
    (folder / UNFINISHED).unlink()


@contextlib.contextmanager
def npz_writer(file: Path, count: int, size: int) -> Iterator[WriteBatch]:
    """Write images as they arrive into one array `arr_0`, uint8 (count, size, size, 3), as ADM's evaluator reads it.

    The array is streamed into the archive, uncompressed; the file has its name only when it is complete.

    Raises:
        ValueError: there were more or fewer images.
    """
    unfinished, written = file.with_name(f".{file.name}.{os.getpid()}.part"), 0
    try:
        # A plain ZipInfo has a fixed date: the same images give the same bytes.
        with (
            zipfile.ZipFile(unfinished, "x") as archive,
            archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as array,
        ):
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, size, size, 3)}
            np.lib.format.write_array_header_1_0(array, header)

            def write_batch(batch: ImageBatch) -> None:
                nonlocal written
                array.write(np.ascontiguousarray(batch.images.permute(0, 2, 3, 1).numpy()).data)
                written += len(batch.images)

            yield write_batch
        if written != count:
            raise ValueError(f"{file}: {written} of {count} images were written: delete the samples and run again")
        unfinished.rename(file)
    finally:
        unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def sheet_writer(file: Path, rows: Mapping[str, Sequence[str]]) -> Iterator[WriteBatch]:
    """Collect the images of the contact sheet as they arrive, and write it at the end."""
    kept: dict[str, Tensor] = {}
    shown = {sample_id for row in rows.values() for sample_id in row}

    def write_batch(batch: ImageBatch) -> None:
        pairs = zip(batch.sample_ids, batch.images, strict=True)
        kept.update((sample_id, image) for sample_id, image in pairs if sample_id in shown)

    yield write_batch
    pictures = {title: [kept[sample_id] for sample_id in row] for title, row in rows.items()}
    write_whole(file, png(labelled_sheet(pictures)))


def labelled_sheet(rows: dict[str, list[Tensor]]) -> Tensor:
    """Lay out rows of pictures (3, S, S), each below its title, as uint8 (3, ...); titles longer than a row are cut."""
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
