"""Preparing images: images/s by workers, and decoding and resizing beside PIL and torchvision."""

import io
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torchvision.io
import torchvision.transforms.v2.functional as tv
from PIL import Image

from infra.compute.cluster import session
from infra.compute.workers import WorkerOptions
from infra.store.store import Store
from sftok.config import DataConfig
from sftok.images.preprocess import crop, resize_shorter, to_rgb
from sftok.prepare.prepare import prepare
from sftok.sources.sources import list_source
from tests.benchmarks.jpegs import DISTINCT, SIZE, jpeg
from tests.benchmarks.table import seconds, show, times

IMAGES = 4_000
CONFIG = DataConfig(image_size=256, num_shards=16, num_val_shards=2)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        jpegs = [jpeg(number) for number in range(DISTINCT)]
        preparing(Path(folder), jpegs)
        decoding(jpegs)


def preparing(folder: Path, jpegs: list[bytes]) -> None:
    """A folder of JPEGs through prepare; what a run takes to start workers and to find all done is taken off."""
    for number in range(IMAGES):
        path = folder / f"data/{number % 10}/{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpegs[number % DISTINCT])
    source, rows, digests, alone = list_source(str(folder / "data")), [], set(), 0.0
    with session():
        prepare(source, CONFIG, out=Store(folder / "warm"), options=WorkerOptions(workers=2))
        for workers in (0, 1, 2):
            out, options, taken = Store(folder / f"out-{workers}"), WorkerOptions(workers=workers), []
            for _ in range(3):
                started = time.perf_counter()
                digests.add(prepare(source, CONFIG, out=out, options=options).content_digest)
                taken.append(time.perf_counter() - started)
            overhead = min(taken[1:])
            speed = IMAGES / (taken[0] - overhead)
            alone = alone or speed
            rows.append([f"{workers} workers", f"{speed:.0f}", times(speed / alone), f"{overhead:.1f} s"])
    assert len(digests) == 1, "the number of workers changed the data"
    kilobytes = sum(map(len, jpegs)) / len(jpegs) / 1000
    columns = ["prepare", "img/s", "of 0 workers", "to start and find all done"]
    show(f"{IMAGES} JPEGs of {SIZE[0]} x {SIZE[1]}, {kilobytes:.0f} kB each (the start is not in img/s)", columns, rows)


def decoding(jpegs: list[bytes]) -> None:
    """JPEG to a 256 crop on one core; torchvision's JPEG decoder reads no CMYK, no orientation, no other format."""
    torch.set_num_threads(1)
    ways = {
        "ours": lambda: [crop(resize_shorter(to_rgb(data), 256), 256) for data in jpegs],
        "plain PIL": lambda: [plain_pil(data) for data in jpegs],
        "torchvision": lambda: [torchvision_way(data) for data in jpegs],
        "ours, decoding alone": lambda: [to_rgb(data) for data in jpegs],
        "PIL, decoding alone": lambda: [Image.open(io.BytesIO(data)).convert("RGB") for data in jpegs],
        "torchvision, decoding alone": lambda: [decoded(data) for data in jpegs],
    }
    taken = seconds(ways, rounds=5)
    rows = []
    for name in ways:
        reference = taken["PIL, decoding alone" if "alone" in name else "plain PIL"]
        rows.append([name, f"{DISTINCT / taken[name]:.0f}", times(reference / taken[name])])
    show("decode, resize, crop to 256, one core", ["", "img/s", "of PIL"], rows)
    ours = torch.stack([crop(resize_shorter(to_rgb(data), 256), 256) for data in jpegs]).float()
    for name, way in {"plain PIL": plain_pil, "torchvision": torchvision_way}.items():
        error = (ours - torch.stack([way(data) for data in jpegs]).float()).abs()
        sys.stdout.write(f"difference to {name}: mean {error.mean():.4f}, largest {error.max():.0f} of 255\n")
    sys.stdout.write("\n")


def plain_pil(data: bytes) -> torch.Tensor:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    scale = 256 / min(image.size)
    image = image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = round((image.width - 256) / 2), round((image.height - 256) / 2)
    return torch.from_numpy(np.array(image.crop((left, top, left + 256, top + 256)))).permute(2, 0, 1)


def decoded(data: bytes) -> torch.Tensor:
    return torchvision.io.decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))


def torchvision_way(data: bytes) -> torch.Tensor:
    return tv.center_crop(tv.resize(decoded(data), [256], tv.InterpolationMode.BICUBIC, antialias=True), [256, 256])


def peak_bytes() -> int:
    """The largest resident size of this process so far; getrusage would tell that of the parent that started it."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
