"""From a source to image Parquet: every entry read once, decoded to prove that it is an image, and kept as it was.

A shard is a bucket of the hash of the image id, so the same images make the same files for any listing order and any
number of workers, and one more image changes one file. Files, each with rows sorted by image id:

    train-00000-of-00008.parquet ...  image_id, image {bytes, path}, label, width, height, sha256
    val-00000-of-00004.parquet ...
    rejects.parquet                   path, reason, size
"""

import hashlib
import io
import json
import logging
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from infra.artifacts import FileEntry, put, shard_entry, write_shard
from infra.progress import Progress, silent
from infra.store import Store
from sftok.config import DataConfig
from sftok.preprocess import UnreadableImageError, to_rgb
from sftok.sources import SPLITS, Entry, RejectedEntryError, Source

log = logging.getLogger(__name__)

REJECTS = "rejects.parquet"
METADATA_KEY = b"sftok"
_REJECTS_KEY = b"sftok.rejects"
LARGE_SHARD = 2**30  # bytes
ROWS_A_GROUP = 256  # 28 MB of ImageNet's JPEGs: one request to S3, and a bound on what a reader holds


class Prepared(NamedTuple):
    """What prepare wrote: found = accepted + rejected, and accepted = train + val."""

    counts: dict[str, int]  # found, accepted, rejected, train, val, classes
    content_digest: str  # of class names and every image id, sha256, label and split
    files: list[FileEntry]


class Reject(NamedTuple):
    """An entry that is no image, and why."""

    path: str
    reason: str
    size: int  # bytes


class Accepted(NamedTuple):
    """What identifies a prepared image."""

    image_id: str
    sha256: str  # of the original bytes
    label: int | None
    split: str


class ShardJob(NamedTuple):
    """The entries of one shard: a unit of work that needs nothing of the others."""

    name: str
    split: str
    entries: list[Entry]


class ShardResult(NamedTuple):
    """One written shard."""

    file: FileEntry
    accepted: list[Accepted]
    rejects: list[Reject]


def prepare(source: Source, config: DataConfig, *, out: Store, progress: Progress = silent) -> Prepared:
    """Write the source's images as Parquet shards into the folder `out`; finished shards of a killed run are kept.

    Raises:
        ValueError: where a split or a class is left without a usable image.
    """
    jobs = plan_shards(source, config)
    accepted: list[Accepted] = []
    rejects: list[Reject] = []
    files: list[FileEntry] = []
    for job in jobs:
        result = prepare_shard(job, source, config, out=out)
        files.append(result.file)
        accepted += result.accepted
        rejects += result.rejects
        progress(len(accepted) + len(rejects), len(source.entries), {"rejected": len(rejects)})
    accepted.sort()
    rejects.sort()
    assert len(accepted) + len(rejects) == len(source.entries), "an entry is neither accepted nor rejected"
    _check_usable(source, accepted, rejects)
    files.append(put(out, REJECTS, _rejects_parquet(rejects), len(rejects)))
    train = sum(image.split == "train" for image in accepted)
    counts = {
        "found": len(source.entries),
        "accepted": len(accepted),
        "rejected": len(rejects),
        "train": train,
        "val": len(accepted) - train,
        "classes": len(source.class_names or ()),
    }
    return Prepared(counts, _content_digest(source.class_names, accepted), files)


def plan_shards(source: Source, config: DataConfig) -> list[ShardJob]:
    """Divide the entries into splits, where the source has none, and into hash buckets; also empty buckets are shards.

    Raises:
        ValueError: for two entries with the same image id.
    """
    shards = {"train": config.num_shards, "val": config.num_val_shards}
    jobs = {
        (split, index): ShardJob(f"{split}-{index:05d}-of-{shards[split]:05d}.parquet", split, [])
        for split in SPLITS
        for index in range(shards[split])
    }
    entries = sorted(source.entries, key=lambda entry: entry.image_id)
    held_out = _held_out([entry.image_id for entry in entries if not (entry.split or entry.problem)], config)
    before = None
    for entry in entries:
        if entry.image_id == before and not entry.problem:
            raise ValueError(f"source {source.uri!r} holds image id {before!r} twice: image ids are unique")
        before = entry.image_id
        split = entry.split or ("val" if entry.image_id in held_out else "train")
        jobs[split, _hash(entry.image_id)[0] % shards[split]].entries.append(entry)
    largest = max(sum(entry.size for entry in job.entries) for job in jobs.values())
    if largest > LARGE_SHARD:
        log.warning("a shard of %.1f GB is held in memory while it is written: raise data.num_shards", largest / 1e9)
    return list(jobs.values())


def prepare_shard(job: ShardJob, source: Source, config: DataConfig, *, out: Store) -> ShardResult:
    """Read, check and write the images of one shard, or find them written."""
    if (file := shard_entry(out, job.name)) is not None:
        return _read_back(job, file, out)
    class_ids = {name: index for index, name in enumerate(source.class_names or ())}
    accepted: list[Accepted] = []
    rejects: list[Reject] = []
    rows: list[dict[str, Any]] = []
    sink = io.BytesIO()
    schema = _schema(source.class_names, job.split)
    with pq.ParquetWriter(sink, schema, **_writer_options()) as writer:
        for entry in job.entries:
            try:
                row = _row(entry, source, class_ids, config.max_pixels)
            except (RejectedEntryError, UnreadableImageError) as error:
                rejects.append(Reject(entry.image_id, str(error), entry.size))
                continue
            accepted.append(Accepted(row["image_id"], row["sha256"], row["label"], job.split))
            rows.append(row)
            if len(rows) == ROWS_A_GROUP:
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                rows.clear()
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
        # The shard tells what it left out, so that a run that was killed need not read its images again to know.
        writer.add_key_value_metadata({_REJECTS_KEY: json.dumps(rejects).encode()})
    return ShardResult(write_shard(out, job.name, sink.getvalue(), len(accepted)), accepted, rejects)


def _row(entry: Entry, source: Source, class_ids: dict[str, int], max_pixels: int) -> dict[str, Any]:
    if entry.problem is not None:
        raise RejectedEntryError(entry.problem)
    data = source.read(entry)
    image = to_rgb(data, max_pixels=max_pixels, checksums=True)
    return {
        "image_id": entry.image_id,
        "image": {"bytes": data, "path": entry.image_id},
        "label": class_ids.get(entry.class_name) if entry.class_name is not None else None,
        "width": image.width,
        "height": image.height,
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def _read_back(job: ShardJob, file: FileEntry, out: Store) -> ShardResult:
    with out.open(job.name) as opened, pq.ParquetFile(opened) as parquet:
        table = parquet.read(["image_id", "sha256", "label"])
        rejects = [Reject(*reject) for reject in json.loads(parquet.metadata.metadata[_REJECTS_KEY])]
    accepted = [Accepted(row["image_id"], row["sha256"], row["label"], job.split) for row in table.to_pylist()]
    return ShardResult(file, accepted, rejects)


def _hash(image_id: str) -> tuple[int, float]:
    """Two independent draws from an image id: an integer for its bucket, a number in [0, 1) for its split."""
    digest = hashlib.sha256(image_id.encode()).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:16], "big") / 2**64


def _held_out(image_ids: Sequence[str], config: DataConfig) -> set[str]:
    """The val images of a source without splits; of a small one at least the image that comes first by hash."""
    draws = {image_id: _hash(image_id)[1] for image_id in image_ids}
    held_out = {image_id for image_id, draw in draws.items() if draw < config.val_fraction}
    return held_out or set(sorted(draws, key=lambda image_id: draws[image_id])[:1])


def _check_usable(source: Source, accepted: Sequence[Accepted], rejects: Sequence[Reject]) -> None:
    """Refuse what nothing can be trained on or measured with."""
    example = f" (rejected: {rejects[0].path!r}, {rejects[0].reason})" if rejects else ""
    for split in SPLITS:
        if not any(image.split == split for image in accepted):
            raise ValueError(f"source {source.uri!r} has no usable image in {split}{example}: add images")
    labels = {image.label for image in accepted if image.split == "train"}
    for label, name in enumerate(source.class_names or ()):
        if label not in labels:
            raise ValueError(
                f"source {source.uri!r}: class {name!r} has no usable image in train{example}:"
                " add images to it, remove it, or lower data.val_fraction"
            )


def _content_digest(class_names: Sequence[str] | None, accepted: Iterable[Accepted]) -> str:
    sha256 = hashlib.sha256(json.dumps(class_names).encode() + b"\n")
    for image in accepted:
        sha256.update(json.dumps(image).encode() + b"\n")
    return sha256.hexdigest()[:32]


def _schema(class_names: Sequence[str] | None, split: str) -> pa.Schema:
    """Arrow schema with what Hugging Face `datasets` needs to see images and classes."""
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
    # No dictionary and no statistics of image bytes: no two are equal, and nobody filters by them.
    return {
        "compression": "zstd",
        "compression_level": 1,
        "use_dictionary": False,
        "write_statistics": ["image_id", "label", "width", "height"],
    }


def _rejects_parquet(rejects: Sequence[Reject]) -> bytes:
    schema = pa.schema([("path", pa.string()), ("reason", pa.string()), ("size", pa.int64())])
    sink = io.BytesIO()
    pq.write_table(
        pa.Table.from_pylist([reject._asdict() for reject in rejects], schema=schema), sink, compression="zstd"
    )
    return sink.getvalue()
