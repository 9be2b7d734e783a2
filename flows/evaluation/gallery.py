"""Galleries of the report: pictures chosen by stated rules, never by looks."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flows.results.types import Gallery, Picture, PictureRow
from sftok.metrics.functional import Images
from sftok.metrics.nearest import NearestResult

Names = Sequence[str]
ImagesByIndex = Mapping[int, Tensor]  # a subset of the images

ROWS = 10  # held-out images, classes and pairs of neighbours shown
SAMPLES = 10  # samples shown per class
EXTREMES = 5  # reconstructions shown per row: worst, median, best


def png(image: Tensor) -> bytes:
    """Encode a uint8 image (3, S, S) as PNG."""
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(file, format="PNG", optimize=True)
    return file.getvalue()


class Pictures:
    """Collector of pictures and their PNG bytes."""

    def __init__(self) -> None:
        self.images: dict[str, bytes] = {}

    def add(self, file: str, image: Tensor, *, alt: str, caption: str = "") -> Picture:
        """Store a uint8 image (3, S, S) under `file`, and return its entry in the report."""
        self.images[file] = png(image)
        return Picture(file=file, alt=alt, caption=caption)


def name_of(class_id: int, class_names: Sequence[str]) -> str:
    """Return the name of a class, or "no class" for an image without one."""
    return class_names[class_id] if 0 <= class_id < len(class_names) else "no class"


def class_balanced(class_ids: Tensor, count: int) -> list[int]:
    """Select up to `count` indices in rounds over the classes (evenly spaced ones if there are more than `count`)."""
    ids = class_ids.tolist()
    classes = sorted(set(ids))
    if len(classes) > count:
        classes = [classes[i] for i in np.linspace(0, len(classes) - 1, count).round().astype(int)]
    queues = [[i for i, found in enumerate(ids) if found == wanted] for wanted in classes]
    rounds = max(len(queue) for queue in queues)
    chosen = [queue[turn] for turn in range(rounds) for queue in queues if turn < len(queue)][:count]
    return sorted(chosen, key=lambda i: (ids[i], i))


def reconstructions_shown(class_ids: Tensor) -> list[int]:
    """Select the held-out images whose reconstructions are shown, by index."""
    return class_balanced(class_ids, ROWS)


def reconstruction_gallery(
    pictures: Pictures,
    originals: Tensor,
    by_steps: Mapping[int, ImagesByIndex],
    *,
    class_ids: Tensor,
    class_names: Names,
) -> Gallery:
    """Show held-out images beside their reconstructions in each number of decoding steps."""
    rows = []
    for index in reconstructions_shown(class_ids):
        name = name_of(int(class_ids[index]), class_names)
        stem = f"reconstructions/{index:06d}"
        row = [pictures.add(f"{stem}-original.png", originals[index], alt=f"Held-out image of class {name}")]
        row += [
            pictures.add(f"{stem}-{k}.png", images[index], alt=f"Class {name} reconstructed in {k} decoding steps")
            for k, images in by_steps.items()
        ]
        rows.append(PictureRow(title=name, pictures=tuple(row)))
    return Gallery(
        rule="Held-out images, on which no stage was trained: the first of each class by image id.",
        columns=("original", *(f"{k} step" if k == 1 else f"{k} steps" for k in by_steps)),
        rows=tuple(rows),
    )


def extremes_shown(psnr: Tensor) -> dict[str, list[int]]:
    """Select the reconstructions with the lowest, median and highest PSNR: indices by row title."""
    order = torch.argsort(psnr, stable=True).tolist()
    some = min(EXTREMES, len(order) // 3 or 1)
    middle = (len(order) - some) // 2
    return {"worst": order[:some], "median": order[middle : middle + some], "best": order[-some:]}


def extreme_gallery(
    pictures: Pictures, originals: Tensor, images: ImagesByIndex, psnr: Tensor, *, class_ids: Tensor, class_names: Names
) -> Gallery:
    """Show the reconstructions of `extremes_shown`, each beside its original."""
    rows = []
    for title, chosen in extremes_shown(psnr).items():
        row = []
        for index in chosen:
            name, decibels = name_of(int(class_ids[index]), class_names), f"{float(psnr[index]):.1f} dB"
            stem = f"extremes/{index:06d}"
            row.append(pictures.add(f"{stem}-original.png", originals[index], alt=f"Held-out image of class {name}"))
            text = f"Class {name} reconstructed, {decibels}"
            row.append(pictures.add(f"{stem}.png", images[index], alt=text, caption=decibels))
        rows.append(PictureRow(title=title, pictures=tuple(row)))
    return Gallery(
        rule="Held-out images with the lowest, median and highest PSNR, at the largest number of decoding steps.",
        columns=("original", "reconstruction"),
        rows=tuple(rows),
    )


def samples_shown(class_ids: Tensor) -> list[int]:
    """Select the samples that are shown: indices of the first ones of each class."""
    firsts = class_balanced(class_ids, min(ROWS, len(set(class_ids.tolist()))))
    return [
        index for first in firsts for index in (class_ids == class_ids[first]).nonzero().flatten()[:SAMPLES].tolist()
    ]


def sample_gallery(pictures: Pictures, samples: ImagesByIndex, *, class_ids: Tensor, class_names: Names) -> Gallery:
    """Show the samples of `samples_shown`, one row per class."""
    by_class: dict[int, list[int]] = {}
    for index in samples_shown(class_ids):
        by_class.setdefault(int(class_ids[index]), []).append(index)
    rows = []
    for class_id, chosen in by_class.items():
        name = name_of(class_id, class_names)
        row = [
            pictures.add(f"samples/{index:06d}.png", samples[index], alt=f"Generated sample {n + 1} of class {name}")
            for n, index in enumerate(chosen)
        ]
        rows.append(PictureRow(title=name, pictures=tuple(row)))
    return Gallery(rule=f"The first {SAMPLES} samples of each class, in the order of sampling.", rows=tuple(rows))


def neighbour_gallery(
    pictures: Pictures,
    samples: ImagesByIndex,
    *,
    nearest: NearestResult,
    train: Images,
    class_ids: Tensor,
    class_names: Names,
) -> Gallery:
    """Show, for each class, the sample closest to any training image beside that image: copies would appear here first.

    `nearest` and `class_ids` follow the order of `samples`, whose keys name their files.
    """
    indices = list(samples)
    rows = []
    for first in class_balanced(class_ids, min(ROWS, len(set(class_ids.tolist())))):
        members = (class_ids == class_ids[first]).nonzero().flatten()
        index = int(members[torch.argmin(nearest.distances[members])])
        number = indices[index]
        neighbour, distance = int(nearest.indices[index]), float(nearest.distances[index])
        name = name_of(int(class_ids[index]), class_names)
        pair = (
            pictures.add(f"samples/{number:06d}.png", samples[number], alt=f"Generated sample of class {name}"),
            pictures.add(
                f"training/{neighbour:06d}.png",
                train[neighbour],
                alt=f"Its nearest training image, at distance {distance:.2f}",
                caption=f"{distance:.2f}",
            ),
        )
        rows.append(PictureRow(title=name, pictures=pair))
    return Gallery(
        rule="For each class, the sample closest to any training image: copies would appear here first.",
        columns=("sample", "training"),
        rows=tuple(rows),
    )
