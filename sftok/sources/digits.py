"""scikit-learn's handwritten digits as a source: real images that need no download."""

import functools
import gzip
import importlib.util
import io
from pathlib import Path

import numpy as np
from PIL import Image

from sftok.config import DataConfig
from sftok.sources.listing import DIGITS, Entries, Entry, Source


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Read scans (1797, 8, 8) and labels from sklearn's file: importing its `load_digits` takes up to two seconds."""
    spec = importlib.util.find_spec("sklearn")
    folder = Path(spec.origin).parent if spec is not None and spec.origin is not None else Path()
    with gzip.open(folder / "datasets" / "data" / "digits.csv.gz", "rt") as file:
        table = np.loadtxt(file, delimiter=",")
    return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int64)


def read_digit(entry: Entry) -> bytes:
    """Read a digit, 8x8 with 17 grey levels, as the PNG of a 32x32 RGB image (bicubic)."""
    return _png(int(entry.image_id[len("digits/") : -len(".png")]))


@functools.cache  # 3 MB for all: they are listed with their sizes, and then read
def _png(index: int) -> bytes:
    scan = _digits()[0][index]
    grey = Image.fromarray(np.round(scan * (255 / 16)).astype(np.uint8))
    file = io.BytesIO()
    grey.resize((32, 32), Image.Resampling.BICUBIC).convert("RGB").save(file, "PNG", compress_level=6)
    return file.getvalue()


def list_digits(config: DataConfig) -> Source:
    """List the 1,797 digits with their ten classes."""
    _, labels = _digits()
    is_labelled = config.labels != "none"
    entries = (
        Entry(f"digits/{index:04d}.png", 0, class_name=str(label) if is_labelled else None)
        for index, label in enumerate(labels)
    )
    sized = (entry._replace(size=len(read_digit(entry))) for entry in entries)
    names = tuple(map(str, range(10))) if is_labelled else None
    return Source(DIGITS, Entries.of(sized), names, read_digit, kind="digits")
