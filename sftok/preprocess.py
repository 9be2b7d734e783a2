"""From image bytes to the pixels a model sees: one decoding, one resize, one set of seeded random changes.

Training, encoding and evaluation share these functions, so that a code means the same image everywhere. Any change
of pixels that they make is another `PREPROCESSING`, which belongs to an artifact's identity.
"""

import hashlib
import io
import math
import re
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError

from sftok.config import AugmentConfig

PREPROCESSING = "resize-bicubic-antialias-crop/1"
# By content, never by file name; formats whose decoders start other programs (EPS, WMF) are left out on purpose.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "DIB", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF")
Image.init()  # open() knows only the five commonest formats before
# A 1 x 80,000,000 image passes every pixel limit and would be resized to 256 x 20,480,000,000: longer is cut first.
LONGEST_SIDE = 4
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
    """Bytes that are no image we can decode; the message is the reason, in a few words."""


def to_rgb(data: bytes, *, max_pixels: int | None = None, checksums: bool = False) -> Image.Image:
    """Decode the first frame of an image into 8-bit RGB, upright, transparency over white.

    16-bit grey keeps its high byte, as Pillow does for 16-bit colour. Colour profiles are not applied.

    Args:
        data: the bytes of the file.
        max_pixels: the largest width x height, checked before any pixel is decoded; Pillow's own limit of
            178,956,970 holds besides.
        checksums: check the checksums that decoding skips (PNG).

    Raises:
        UnreadableImageError: with the reason.
    """
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


def resize_shorter(image: Image.Image, size: int) -> torch.Tensor:
    """Resize so that the shorter side is `size` pixels, with antialiased bicubic; uint8 (3, H, W).

    Equals torchvision's Resize on PIL images. What is longer than 4:1 is cut around the centre.
    """
    width, height = image.size
    shorter = min(width, height)
    full = (size * width // shorter, size * height // shorter)
    new = (min(full[0], LONGEST_SIDE * size), min(full[1], LONGEST_SIDE * size))
    left, top = (full[0] - new[0]) // 2, (full[1] - new[1]) // 2
    box = (
        left * width / full[0],
        top * height / full[1],
        (left + new[0]) * width / full[0],
        (top + new[1]) * height / full[1],
    )
    resized = image.resize(new, Image.Resampling.BICUBIC, box=box)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()


def crop(image: torch.Tensor, size: int, where: float | None = None) -> torch.Tensor:
    """Cut a square out of (3, H, W): torchvision's CenterCrop, or uniformly by a draw `where` in [0, 1)."""
    room = image.shape[1] - size, image.shape[2] - size
    top, left = (round(side / 2) if where is None else int(where * (side + 1)) for side in room)
    return image[:, top : top + size, left : left + size]


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 images to float32 in [0, 1]; the only place where this happens."""
    return images.to(torch.float32).div_(255)


def uniforms(*key: str | int) -> tuple[float, ...]:
    """Eight numbers in [0, 1) that depend on the key alone: the same on every machine, rank and in every batch."""
    digest = hashlib.sha512("\0".join(map(str, key)).encode()).digest()
    return tuple(int.from_bytes(digest[at : at + 8], "big") / 2**64 for at in range(0, 64, 8))


def augment(images: torch.Tensor, config: AugmentConfig, draws: Sequence[Sequence[float]]) -> torch.Tensor:
    """Change each image by its own draws: affine within the config's bounds, then perhaps mirrored.

    Args:
        images: float32 (n, 3, S, S).
        config: bounds.
        draws: for each image its `uniforms`.

    Returns:
        float32 (n, 3, S, S) within the range of the input.
    """
    if config.is_affine:
        images = affine(images, config, draws)
    if config.flip:
        mirrored = torch.tensor([draw[4] < 0.5 for draw in draws])
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    return images


def affine(images: torch.Tensor, config: AugmentConfig, draws: Sequence[Sequence[float]]) -> torch.Tensor:
    """Rotate, zoom and shift each image (n, 3, S, S), bilinear; what comes into view repeats the border."""
    coefficients = torch.tensor([_inverse_affine(config, draw) for draw in draws], dtype=torch.float64)
    size = images.shape[-1]
    at = (torch.arange(size, dtype=torch.float64) * 2 + 1) / size - 1
    # By element and not by F.affine_grid: its matrix product may round by the number of images in the batch.
    a, b, c, d, e, f = (column[:, None, None] for column in coefficients.unbind(1))
    x, y = at[None, None, :], at[None, :, None]
    grid = torch.stack((a * x + b * y + c, d * x + e * y + f), dim=-1).to(images.dtype)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def variant_name(name: str) -> tuple[str, int]:
    """Split a variant's name into its kind and number: center, flip, or affine-K with K from 1.

    Raises:
        ValueError: for any other name.
    """
    if name in ("center", "flip"):
        return name, 0
    if match := re.fullmatch(r"affine-([1-9][0-9]{0,5})", name):
        return "affine", int(match[1])
    raise ValueError(f"variant {name!r} is not known: choose center, flip, or affine-1, affine-2 ...")


def _inverse_affine(config: AugmentConfig, draw: Sequence[float]) -> tuple[float, ...]:
    """Where an output point comes from, in coordinates of -1 to 1: x' = a x + b y + c, y' = d x + e y + f."""
    angle = math.radians(config.rotate) * (2 * draw[0] - 1)
    zoom = 1 + config.zoom * (2 * draw[1] - 1)
    shift_x, shift_y = (2 * config.shift * (2 * u - 1) for u in draw[2:4])
    cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
    return (cos, sin, -cos * shift_x - sin * shift_y, -sin, cos, sin * shift_x - cos * shift_y)


def _as_rgb(image: Image.Image) -> Image.Image:
    """Any mode to 8-bit RGB, transparency over white."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return _grey_16(image)
    if image.mode in ("I", "F"):
        raise UnreadableImageError(f"pixels of mode {image.mode} have no defined white")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _grey_16(image: Image.Image) -> Image.Image:
    """16-bit grey to RGB by its high byte; convert() would clip everything above 255 to white."""
    bits, inverted = 16, False
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        bits, inverted = tags.get(_BITS_TAG, (16,))[0], tags.get(_PHOTOMETRIC_TAG) == 0
    high = (np.asarray(image).astype(np.int64) >> (bits - 8)).clip(0, 255).astype(np.uint8)
    return Image.fromarray(255 - high if inverted else high).convert("RGB")


def _upright(rgb: Image.Image, image: Image.Image) -> Image.Image:
    """Turn as the camera says; metadata that cannot be read say nothing, and the pixels are good without them."""
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except Exception:  # the parsers of EXIF and XMP raise as many kinds of errors as the decoders
        return rgb
    return rgb.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else rgb


def _check_png(data: bytes) -> None:
    """Compare the checksum of every chunk: decoding skips those of the pixels."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            image.verify()


def _short(error: Exception) -> str:
    """One line of an error, with its type where it has no text."""
    return " ".join(str(error).split())[:200] or type(error).__name__
