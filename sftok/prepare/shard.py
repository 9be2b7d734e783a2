"""Prepare one shard: read its entries ahead, decode them, and write them unchanged or resized; list the rejected."""

import collections
import functools
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from infra.artifacts import set_hash
from infra.artifacts.shards import FileEntry, shard_entry, write_shard
from infra.store.store import Store
from sftok.config import DataConfig
from sftok.images.contract import METADATA_KEY
from sftok.images.decode import UnreadableImageError, to_rgb
from sftok.images.resize_and_crop import resized
from sftok.prepare.plan import ShardJob
from sftok.sources.class_ids import class_name
from sftok.sources.listing import Entry, RejectedEntryError, Source

_REJECTS_KEY = b"sftok.rejects"
ROWS_A_GROUP = 256  # 28 MB of ImageNet's JPEGs: one request to S3, and a bound on a reader's memory
READERS = 8  # threads that read ahead: on S3 an image is a request of some 20 ms
REJECTED = pa.schema([("path", pa.large_string()), ("reason", pa.large_string()), ("size", pa.int64())])


class Reject(NamedTuple):
    """A rejected entry, and the reason."""

    path: str
    reason: str
    size: int  # bytes


class ShardResult(NamedTuple):
    """A written shard, with a summary of its images and its rejected entries."""

    file: FileEntry
    images: int  # their product as in `infra.artifacts.set_hash`
    labels: int  # bit set of the labels that occur
    packed_rejects: bytes  # compressed, since a driver holds the results of a million shards

    @property
    def rejects(self) -> pa.Table:
        """Path, reason and size of the rejected entries."""
        rejects = json.loads(zlib.decompress(self.packed_rejects)) if self.packed_rejects else []
        columns = list(zip(*rejects, strict=True)) or [()] * len(REJECTED)
        arrays = [pa.array(column, field.type) for column, field in zip(columns, REJECTED, strict=True)]
        return pa.table(arrays, REJECTED)


class ShardWriter:
    """A worker that makes one shard per call."""

    def __init__(self, source: Source, config: DataConfig, out: Store) -> None:
        self.source, self.config, self.out = source, config, out

    def __call__(self, job: ShardJob) -> ShardResult:
        """Make a shard, unless it is made already."""
        return prepare_shard(job, self.source, self.config, out=self.out)


def prepare_shard(job: ShardJob, source: Source, config: DataConfig, *, out: Store) -> ShardResult:
    """Read, check and write the images of one shard, unless they are written already."""
    if (file := shard_entry(out, job.name)) is not None:
        return _read_back(job, file, out)
    to_row = _Rows(source, config)
    accepted: list[tuple[str, str, int | None]] = []
    rejects: list[Reject] = []
    rows: list[dict[str, Any]] = []
    sink = io.BytesIO()
    schema = _schema(source.class_names, job.split)
    with pq.ParquetWriter(sink, schema, **_writer_options()) as writer:
        for entry, read in _read_ahead(job.entries, to_row.read):
            try:
                row = to_row(entry, read())
            except (RejectedEntryError, UnreadableImageError) as error:
                rejects.append(Reject(entry.image_id, str(error), entry.size))
                continue
            accepted.append((row["image_id"], row["sha256"], row["label"]))
            rows.append(row)
            if len(rows) == ROWS_A_GROUP:
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                rows.clear()
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
        # The shard lists its rejected entries, so that a resumed run need not read its images again to know them.
        writer.add_key_value_metadata({_REJECTS_KEY: json.dumps(rejects).encode()})
    file = write_shard(out, job.name, sink.getvalue(), len(accepted))
    return _result(job, file, accepted, rejects)


class _Rows:
    """Makes rows from entries, or raises the reason to reject them."""

    def __init__(self, source: Source, config: DataConfig) -> None:
        self.source, self.config = source, config
        self.class_ids = {name: index for index, name in enumerate(source.class_names or ())}

    def read(self, entry: Entry) -> bytes:
        """Read the bytes of an entry."""
        if entry.problem is not None:
            raise RejectedEntryError(entry.problem)
        if self.source.class_names is not None and entry.class_name is None and self.config.labels == "required":
            raise RejectedEntryError("it has no label")
        return self.source.read(entry)

    def __call__(self, entry: Entry, data: bytes) -> dict[str, Any]:
        image = to_rgb(data, max_pixels=self.config.max_pixels, checksums=True)
        if self.config.store_size:
            image = resized(image, self.config.store_size)
            data = _kept(image, self.config.store_format)
        return {
            "image_id": entry.image_id,
            "image": {"bytes": data, "path": entry.image_id},
            "label": None if entry.class_name is None else self.class_ids[class_name(entry.class_name)],
            "width": image.width,
            "height": image.height,
            "sha256": hashlib.sha256(data).hexdigest(),
        }


def _kept(image: Image.Image, name: str) -> bytes:
    """Save an image as the bytes of a lossless file."""
    file = io.BytesIO()
    if name == "webp":  # at the lowest effort: five times as fast, and an eighth larger
        image.save(file, "WEBP", lossless=True, quality=0, method=0, exact=True)
    else:
        image.save(file, "PPM")
    return file.getvalue()


def _read_ahead(
    entries: Iterable[Entry], read: Callable[[Entry], bytes]
) -> Iterator[tuple[Entry, Callable[[], bytes]]]:
    """Yield entries in order, each with a function that returns its bytes or raises; some are read ahead."""
    waiting: collections.deque[tuple[Entry, Future[bytes]]] = collections.deque()
    with ThreadPoolExecutor(READERS, thread_name_prefix="read") as pool:
        try:
            for entry in entries:
                waiting.append((entry, pool.submit(read, entry)))
                if len(waiting) > READERS:
                    first, future = waiting.popleft()
                    yield first, future.result
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result
        finally:
            for _, future in waiting:
                future.cancel()


def _read_back(job: ShardJob, file: FileEntry, out: Store) -> ShardResult:
    with out.open(job.name) as opened, pq.ParquetFile(opened) as parquet:
        table = parquet.read(["image_id", "sha256", "label"])
        rejects = [Reject(*reject) for reject in json.loads(parquet.metadata.metadata[_REJECTS_KEY])]
    return _result(job, file, [(row["image_id"], row["sha256"], row["label"]) for row in table.to_pylist()], rejects)


def _result(
    job: ShardJob, file: FileEntry, accepted: Sequence[tuple[str, str, int | None]], rejects: Sequence[Reject]
) -> ShardResult:
    images = set_hash.of_items(json.dumps([*image, job.split]).encode() for image in accepted)
    labels = functools.reduce(int.__or__, (1 << label for _, _, label in accepted if label is not None), 0)
    packed = zlib.compress(json.dumps(rejects).encode()) if rejects else b""
    return ShardResult(file, images, labels, packed)


def _schema(class_names: Sequence[str] | None, split: str) -> pa.Schema:
    """Make the Arrow schema, with metadata by which Hugging Face `datasets` recognises images and classes."""
    label: dict[str, object] = {"dtype": "int64", "_type": "Value"}
    if class_names:
        label = {"names": list(class_names), "_type": "ClassLabel"}
    features = {
        "image_id": {"dtype": "string", "_type": "Value"},
        "image": {"_type": "Image"},
        "label": label,
        "width": {"dtype": "int32", "_type": "Value"},
        "height": {"dtype": "int32", "_type": "Value"},
        "sha256": {"dtype": "string", "_type": "Value"},
    }
    fields = [
        pa.field("image_id", pa.string()),
        pa.field("image", pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])),
        pa.field("label", pa.int64()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("sha256", pa.string()),
    ]
    metadata = {
        b"huggingface": json.dumps({"info": {"features": features}}).encode(),
        METADATA_KEY: json.dumps({"class_names": class_names, "split": split}).encode(),
    }
    return pa.schema(fields, metadata=metadata)


def _writer_options() -> dict[str, Any]:
    # No dictionary or statistics of image bytes: no two are equal, and nothing filters by them.
    return {
        "compression": "zstd",
        "compression_level": 1,
        "use_dictionary": False,
        "write_statistics": ["image_id", "label", "width", "height"],
    }
