"""Decode image files to upright 8-bit RGB: part of `PREPROCESSING` (see `preprocess`).

A module of its own, since prepare and decoding processes need no torch, whose import would take longer than a small
shard.
"""

import io
import zlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, UnidentifiedImageError

from sftok.images.resize_and_crop import Pixels, resized, square

# Recognised by content, never by file name; formats whose decoders start other programs (EPS, WMF) are excluded.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "DIB", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF")
Image.init()  # before it, open() knows only the five most common formats
_PNG, _PNG_TEXTS = b"\x89PNG\r\n\x1a\n", (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
_ORIENTATION_TAG, _BITS_TAG, _PHOTOMETRIC_TAG = 0x0112, 258, 262
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImageError(ValueError):
    """Bytes that do not decode to an image; the message is the reason, in a few words."""


def to_rgb(data: bytes, *, max_pixels: int | None = None, checksums: bool = False) -> Image.Image:
    """Decode the first frame of an image into 8-bit RGB, upright, transparency over white.

    16-bit grey keeps its high byte, as Pillow does for 16-bit colour. Colour profiles are not applied.

    Args:
        data: the bytes of the file.
        max_pixels: the largest width x height, checked before any pixel is decoded; Pillow's own limit of
            178,956,970 applies as well.
        checksums: verify the checksums that decoding skips (PNG).

    Raises:
        UnreadableImageError: the bytes cannot be decoded.
    """
    try:
        return _decoded(data, max_pixels, checksums=checksums)
    except UnreadableImageError:
        if (plain := _png_without_metadata(data)) is None:
            raise
        return _decoded(plain, max_pixels, checksums=checksums)


def _decoded(data: bytes, max_pixels: int | None, *, checksums: bool) -> Image.Image:
    if not data:
        raise UnreadableImageError("empty file")
    try:
        if checksums:
            _check_png(data)
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if max_pixels is not None and image.width * image.height > max_pixels:
            raise UnreadableImageError(f"{image.width} x {image.height} is more than max_pixels = {max_pixels}")
        image.load()
        return _upright(_as_rgb(image), image)
    except (UnreadableImageError, MemoryError):
        raise  # a full memory says nothing about the image
    except Image.DecompressionBombError as error:
        raise UnreadableImageError(f"too large for Pillow: {_short(error)}") from error
    except UnidentifiedImageError as error:
        raise UnreadableImageError("not an image in a known format") from error
    except Exception as error:  # Pillow's decoders raise SyntaxError, struct.error, zlib.error, IndexError and more
        raise UnreadableImageError(f"cannot be decoded: {_short(error)}") from error


def squares(data: bytes, sides: Sequence[int], where: float | None = None) -> list[Pixels]:
    """Decode an image, resize it to each of these shorter sides and cut squares out, (3, side, side) each.

    Args:
        data: the bytes of the file.
        sides: in pixels.
        where: None for the centre, or a draw in [0, 1) of the position.

    Raises:
        UnreadableImageError: the bytes cannot be decoded.
    """
    image = to_rgb(data)
    return [square(resized(image, side), side, where) for side in sides]


def _as_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to 8-bit RGB, transparency over white."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return _grey_16(image)
    if image.mode in ("I", "F"):
        raise UnreadableImageError(f"pixels of mode {image.mode} have no defined white")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _grey_16(image: Image.Image) -> Image.Image:
    """Convert 16-bit grey to RGB by its high byte; convert() would clip everything above 255 to white."""
    bits, inverted = 16, False
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        bits, inverted = tags.get(_BITS_TAG, (16,))[0], tags.get(_PHOTOMETRIC_TAG) == 0
    high = (np.asarray(image).astype(np.int64) >> (bits - 8)).clip(0, 255).astype(np.uint8)
    return Image.fromarray(255 - high if inverted else high).convert("RGB")


def _upright(rgb: Image.Image, image: Image.Image) -> Image.Image:
    """Rotate by the EXIF orientation; metadata that cannot be read is ignored, since the pixels are good without it."""
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except Exception:  # the parsers of EXIF and XMP raise as many kinds of errors as the decoders
        return rgb
    return rgb.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else rgb


def _check_png(data: bytes) -> None:
    """Verify the checksum of every chunk of a PNG; decoding skips those of the pixels."""
    if data.startswith(_PNG):
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            image.verify()


def _png_without_metadata(data: bytes) -> bytes | None:
    """Drop what cannot harm the pixels from a PNG: texts, the colour profile and damaged ancillary chunks.

    Pillow refuses a whole file for texts and profiles above 1 MB, and for a wrong checksum in any chunk.

    Returns:
        the remaining file, or None if there is nothing to drop, or the chunks do not follow each other to the end.
    """
    if not data.startswith(_PNG):
        return None
    kept, at = [_PNG], len(_PNG)
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        kind = data[at + 4 : at + 8]
        is_ancillary = kind[:1].islower()
        is_sound = zlib.crc32(data[at + 4 : end - 4]).to_bytes(4, "big") == data[end - 4 : end]
        if not is_ancillary or (kind not in _PNG_TEXTS and is_sound):
            kept.append(data[at:end])
        at = end
    plain = b"".join(kept)
    return plain if at == len(data) and len(plain) < len(data) else None


def _short(error: Exception) -> str:
    """Shorten an error to one line, or to its type if it has no text."""
    return " ".join(str(error).split())[:200] or type(error).__name__
