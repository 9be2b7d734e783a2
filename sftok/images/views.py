"""Names of the views in which an image is encoded.

    center     the central square of the image resized to a shorter side of S pixels, S the models' image size
    flip       the same, mirrored
    affine-K   the same, rotated, zoomed and shifted by draws of its own (K = 1, 2 ...)
    crop-K     one of ten crops of a larger square, in torchvision's order: top left, top right, bottom left, bottom
               right, centre (1 to 5), then the same five of the mirrored square (6 to 10)

`ten_crop` stands for crop-1 to crop-10. The central crop has a name of its own, since it shows less of the image than
`center`.
"""

import math
import re
from collections.abc import Iterable

TEN_CROP = "ten_crop"
CROPS = tuple(f"crop-{number}" for number in range(1, 11))
# The paper names no crops. LlamaGen's extraction of codes cuts its ten from the centre square of int(1.1 S) pixels.
TEN_CROP_RESIZE = 1.1


def variant_name(name: str) -> tuple[str, int]:
    """Split a view's name into its kind and number: center, flip, affine-K with K from 1, or crop-K with K to 10.

    Raises:
        ValueError: the name is none of these.
    """
    if name in ("center", "flip"):
        return name, 0
    if name in CROPS:
        return "crop", CROPS.index(name) + 1
    if match := re.fullmatch(r"affine-([1-9][0-9]{0,5})", name):
        return "affine", int(match[1])
    raise ValueError(
        f"variant {name!r} is not known: choose center, flip, affine-1, affine-2 ..., or {TEN_CROP} "
        f"({CROPS[0]} to {CROPS[-1]})"
    )


def expanded(names: Iterable[str]) -> tuple[str, ...]:
    """Replace `ten_crop` by the names that it stands for, in its place."""
    return tuple(view for name in names for view in (CROPS if name == TEN_CROP else (name,)))


def has_crops(names: Iterable[str]) -> bool:
    """Return whether any view is one of the ten crops."""
    return any(name in CROPS for name in names)


def ten_crop_side(image_size: int, resize: float) -> int:
    """Return the side in pixels of the square that ten crops of `image_size` are cut from.

    Raises:
        ValueError: it is no larger than the crops, so that all of them would be equal.
    """
    side = int(image_size * resize)
    if side <= image_size:
        raise ValueError(
            f"ten_crop_resize = {resize:g} leaves crops of {image_size} pixels no room to move: "
            f"set at least {math.ceil(100 * (image_size + 1) / image_size) / 100:g}, or leave {TEN_CROP} out"
        )
    return side
