"""Damaged files of every kind: each entry is accepted or rejected, errors are one line, and nothing hangs."""

import io
import random
import resource
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, features
from safetensors.torch import save_file

from flows.recipes.files import load_recipe
from infra.artifacts.manifest import MANIFEST, ArtifactPlan, folder_of, manifest_of, publish, ref_of
from infra.artifacts.shards import put
from infra.store.store import Store
from infra.training.checkpoint import Checkpoints
from infra.training.marker import MARKER, read_marker
from sftok.config import DataConfig
from sftok.prepare.prepare import prepare
from sftok.sources.sources import list_source
from sftok.weights.convert import read_tensors

LONGEST = 400
MEMORY = 1 << 30  # bytes that the process may grow by
CONFIG = DataConfig(image_size=8, labels="optional", num_shards=2, num_val_shards=1, val_fraction=0.3)
Damage = Callable[[random.Random, bytes], bytes]


def damaged(chance: random.Random, data: bytes) -> bytes:
    """Cut, overwrite, repeat or drop some of the bytes."""
    broken = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8))):
        if not broken:
            break
        at, length = chance.randrange(len(broken)), chance.choice((1, 1, 4, 64))
        kind = chance.randrange(5)
        if kind == 0:
            del broken[at:]
        elif kind == 1:
            broken[at] ^= 1 << chance.randrange(8)
        elif kind == 2:
            broken[at : at + length] = chance.randbytes(length)
        elif kind == 3:
            broken[at:at] = broken[at : at + length]
        else:
            del broken[at : at + length]
    return bytes(broken)


def images() -> dict[str, bytes]:
    """One small image in each format."""
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 9, 3), dtype=np.uint8))
    forms: dict[str, tuple[Image.Image, str, dict[str, object]]] = {
        "jpg": (rgb, "JPEG", {}),
        "progressive.jpg": (rgb, "JPEG", {"progressive": True, "exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"}),
        "png": (rgb, "PNG", {}),
        "palette.png": (rgb.convert("P"), "PNG", {"transparency": 0}),
        "deep.png": (Image.fromarray(np.arange(108, dtype=np.uint16).reshape(12, 9) * 600), "PNG", {}),
        "gif": (rgb, "GIF", {}),
        "bmp": (rgb, "BMP", {}),
        "dib": (rgb, "DIB", {}),
        "tif": (rgb, "TIFF", {"compression": "tiff_lzw"}),
        "webp": (rgb, "WEBP", {}),
        "lossless.webp": (rgb, "WEBP", {"lossless": True}),
        "ppm": (rgb, "PPM", {}),
        "jp2": (rgb, "JPEG2000", {}),
    }
    if features.check("avif"):
        forms["avif"] = (rgb, "AVIF", {})
    made = {}
    for name, (image, kind, options) in forms.items():
        file = io.BytesIO()
        image.save(file, kind, **options)
        made[name] = file.getvalue()
    return made


def tar_of(files: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for number, (name, data) in enumerate(files.items()):
            for member, content in ((f"{number}.{name}", data), (f"{number}.cls", b"1")):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def parquet_of(files: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"image": list(files.values()), "label": list(range(len(files)))}), file)
    return file.getvalue()


def one_line(error: ValueError) -> None:
    assert "\n" not in str(error), error
    assert len(str(error)) <= LONGEST + 300, error  # a temporary folder's path may come twice


def prepared(source: Path, out: Store) -> None:
    """Prepare a source, or be refused in one line; nothing is lost."""
    try:
        made = prepare(list_source(str(source), CONFIG), CONFIG, out=out)
    except ValueError as error:
        one_line(error)
        return
    assert made.counts["accepted"] + made.counts["rejected"] == made.counts["found"]


def grown() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def fuzz_images(seed: int, count: int, folder: Path) -> None:
    chance, good = random.Random(seed), images()
    for name, data in good.items():
        (folder / "data" / "a").mkdir(parents=True, exist_ok=True)
        (folder / "data" / "a" / f"good.{name}").write_bytes(data)
    for number in range(count):
        name = chance.choice(sorted(good))
        (folder / "data" / "a" / f"{number}.{name}").write_bytes(damaged(chance, good[name]))
    config = CONFIG.model_copy(update={"max_reject_rate": 1.0})
    made = prepare(list_source(str(folder / "data"), config), config, out=Store(folder / "out"))
    assert made.counts["found"] == count + len(good)
    assert made.counts["accepted"] + made.counts["rejected"] == made.counts["found"]
    assert made.counts["accepted"] >= len(good)


def fuzz_containers(pack: Callable[[dict[str, bytes]], bytes], suffix: str) -> Callable[[int, int, Path], None]:
    def fuzz(seed: int, count: int, folder: Path) -> None:
        chance, whole = random.Random(seed), pack(images())
        for number in range(count):
            path = folder / f"x{suffix}"
            path.write_bytes(damaged(chance, whole))
            prepared(path, Store(folder / f"out{number}"))

    return fuzz


def fuzz_indexes(seed: int, count: int, folder: Path) -> None:
    chance = random.Random(seed)
    for name, data in images().items():
        (folder / name).write_bytes(data)
    text = "path,label,split\n" + "".join(f"{name},{at % 2},train\n" for at, name in enumerate(images()))
    for number in range(count):
        (folder / "index.csv").write_bytes(damaged(chance, text.encode()))
        prepared(folder / "index.csv", Store(folder / f"out{number}"))


def fuzz_recipes(seed: int, count: int, folder: Path) -> None:
    from flows.recipes.files import to_toml

    chance, text = random.Random(seed), to_toml(load_recipe("digits_tiny")).encode()
    for _ in range(count):
        (folder / "recipe.toml").write_bytes(damaged(chance, text))
        try:
            load_recipe(str(folder / "recipe.toml"))
        except ValueError as error:
            one_line(error)


def fuzz_manifests(seed: int, count: int, folder: Path) -> None:
    chance, store = random.Random(seed), Store(folder / "store")
    plan = ArtifactPlan(kind="images", version=1, config={"a": 1}, inputs={})
    out = folder_of(store, plan.kind, plan.digest)
    manifest = publish(store, plan, files=[put(out, "x.txt", b"x")], counts={"rows": 1}, metrics={}, seconds=0.0)
    whole, ref = out.read(MANIFEST), ref_of(store, manifest)
    for _ in range(count):
        out.write(MANIFEST, damaged(chance, whole))
        try:
            manifest_of(store, ref)
        except ValueError as error:
            one_line(error)


def fuzz_checkpoints(seed: int, count: int, folder: Path) -> None:
    chance = random.Random(seed)
    tensors = {f"encoder.{at}.weight": torch.zeros(4, 4) for at in range(8)}
    save_file(tensors, folder / "whole.safetensors")
    torch.save(tensors, folder / "whole.bin")
    for _ in range(count):
        suffix = chance.choice((".safetensors", ".bin"))
        (folder / f"x{suffix}").write_bytes(damaged(chance, (folder / f"whole{suffix}").read_bytes()))
        try:
            read_tensors(folder / f"x{suffix}")
        except ValueError as error:
            one_line(error)


def fuzz_markers(seed: int, count: int, folder: Path) -> None:
    chance, store = random.Random(seed), Store(folder / "store")
    tensors = {f"encoder.{at}.weight": torch.zeros(4, at + 1) for at in range(4)}
    with Checkpoints(store) as checkpoints:
        checkpoints.save(1, tensors, {"lines": [{"step": 1.0}]})
    (key,) = (key for key in store.list() if key.endswith(MARKER))
    whole = store.read(key)
    for _ in range(count):
        store.write(key, damaged(chance, whole))
        try:
            read_marker(store.at("step-000000001"))
        except ValueError as error:
            one_line(error)
        Checkpoints(store).load_into({name: torch.zeros_like(tensor) for name, tensor in tensors.items()})


# What is damaged, how, and how often of 20,000.
KINDS: dict[str, tuple[Callable[[int, int, Path], None], int]] = {
    "images": (fuzz_images, 11_000),
    "tars": (fuzz_containers(tar_of, ".tar"), 2_000),
    "parquet": (fuzz_containers(parquet_of, ".parquet"), 2_000),
    "indexes": (fuzz_indexes, 1_500),
    "recipes": (fuzz_recipes, 1_500),
    "manifests": (fuzz_manifests, 1_000),
    "checkpoints": (fuzz_checkpoints, 1_000),
    "markers": (fuzz_markers, 1_000),
}


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_accepted_or_rejected(kind: str, tmp_path: Path) -> None:
    fuzz, often = KINDS[kind]
    fuzz(0, often // 200, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_twenty_thousand_damaged_files(kind: str, tmp_path: Path) -> None:
    fuzz, often = KINDS[kind]
    before = grown()
    fuzz(1, often, tmp_path)
    assert grown() - before < MEMORY
