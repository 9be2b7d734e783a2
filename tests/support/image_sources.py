"""Makers of small image sources for tests: folders, tars, Parquet files; on disk and on S3."""

import io
import json
import tarfile
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from infra.store.s3 import Bucket
from infra.store.store import Store
from sftok.config import DataConfig
from sftok.prepare.prepare import REJECTS, PrepareResult, prepare
from sftok.sources.sources import list_source

CONFIG = DataConfig(image_size=8, val_fraction=0.25, num_shards=3, num_val_shards=2)


def image_bytes(number: int, file_format: str = "PNG", size: tuple[int, int] = (12, 8)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (number % 256, number // 256, 77)).save(file, file_format)
    return file.getvalue()


def noise(number: int, size: tuple[int, int]) -> bytes:
    """A PNG that does not compress."""
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_files(root: Path, files: Mapping[str, bytes]) -> Path:
    for path, data in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    return root


def upload(root: Path) -> str:
    """Copy a folder to the S3 server of the environment; the URI of the copy."""
    bucket, prefix = Bucket("tests"), f"sources/{uuid.uuid4().hex}"
    for path in root.rglob("*"):
        if path.is_file():
            bucket.write(f"{prefix}/{path.relative_to(root).as_posix()}", path.read_bytes())
    return f"s3://tests/{prefix}"


def tar_bytes(members: Iterable[tuple[str | tarfile.TarInfo, bytes]]) -> bytes:
    """A tar of members in their order, also of ones that tar would refuse to make."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            if info.isreg():
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def samples(numbers: Iterable[int], classes: int = 2) -> list[tuple[str | tarfile.TarInfo, bytes]]:
    """Members of a WebDataset: an image and its class, a number."""
    members: list[tuple[str | tarfile.TarInfo, bytes]] = []
    for number in numbers:
        members += [(f"{number:05d}.png", image_bytes(number)), (f"{number:05d}.cls", b"%d" % (number % classes))]
    return members


def hf_schema(names: list[str]) -> pa.Schema:
    """The schema that Hugging Face `datasets` writes for images with classes."""
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.schema([("image", image), ("label", pa.int64())], metadata=metadata)


def hf_parquet(path: Path, numbers: Iterable[int], names: list[str], **options: object) -> Path:
    """A file of an image dataset as Hugging Face writes it."""
    rows = [
        {"image": {"bytes": image_bytes(number), "path": f"{number}.png"}, "label": number % len(names)}
        for number in numbers
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=hf_schema(names)), path, **options)
    return path


def run(uri: object, store: Store, **changes: object) -> PrepareResult:
    """Prepare a source with CONFIG, some of whose fields are changed."""
    config = CONFIG.model_copy(update=changes)
    return prepare(list_source(str(uri), config), config, out=store)


def rows_of(store: Store, prepared: PrepareResult) -> list[dict]:
    """All rows, with the split of their shard."""
    shards = [file.path for file in prepared.files if file.path != REJECTS]
    return [
        row | {"split": name.partition("-")[0]}
        for name in shards
        for row in pq.read_table(io.BytesIO(store.read(name))).to_pylist()
    ]


def reasons(store: Store) -> dict[str, str]:
    """What was rejected, and why."""
    return {row["path"]: row["reason"] for row in pq.read_table(io.BytesIO(store.read(REJECTS))).to_pylist()}


def contents(store: Store) -> dict[str, bytes]:
    return {name: store.read(name) for name in store.list()}
