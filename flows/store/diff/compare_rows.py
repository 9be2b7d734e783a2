"""Pair the rows of two code datasets: shards of equal name if the images are the same, else by a hash join on disk."""

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from infra.artifacts.verify import bucket_of
from infra.codes.contract import CodeRows, CodesInfo, from_parquet
from infra.progress import Progress
from infra.store.store import Store

MAX_BUCKETS = 256  # files open at once


class Dataset(NamedTuple):
    """A code dataset in a store."""

    ref: str
    store: Store
    keys: Mapping[str, str]
    """of its shards, by name; a shard may be in the folder of another dataset."""
    info: CodesInfo
    images: str | None
    """identity of the images that it was made from."""

    def read(self, name: str) -> CodeRows:
        """Read one shard.

        Raises:
            ValueError: it is damaged, or of another dataset.
        """
        with self.store.open(self.keys[name]) as file:
            info, rows = from_parquet(file, f"{self.store.uri}/{self.keys[name]}")
        if info != self.info:
            raise ValueError(
                f"{name} of {self.ref} is of another dataset than its other shards; run `sftok verify` on it"
            )
        return rows


class Pair(NamedTuple):
    """All views of some images, from both datasets."""

    old: CodeRows
    new: CodeRows


def pairs_of(old: Dataset, new: Dataset, *, progress: Progress) -> Iterator[Pair]:
    """Yield all rows of both datasets, so that all views of an image are in the same pair."""
    # Equal names do not suffice: with other images, an image may be in train here and in val there.
    if old.images is not None and old.images == new.images and old.keys.keys() == new.keys.keys():
        for done, name in enumerate(old.keys, 1):
            yield Pair(old.read(name), new.read(name))
            progress(done, len(old.keys), {})
        return
    buckets = min(max(len(old.keys), len(new.keys)), MAX_BUCKETS)
    total = len(old.keys) + len(new.keys) + buckets
    with tempfile.TemporaryDirectory() as place:
        spills = [_spill(dataset, Path(place) / which, buckets) for dataset, which in ((old, "old"), (new, "new"))]
        done = 0
        for spill in spills:
            for _ in spill:
                done += 1
                progress(done, total, {})
        for bucket in range(buckets):
            yield Pair(*(_unspill(Path(place) / which / str(bucket)) for which in ("old", "new")))
            progress(done + bucket + 1, total, {})


def _spill(dataset: Dataset, place: Path, buckets: int) -> Iterator[str]:
    """Write rows to one file per bucket of image ids; yield each shard when it is done."""
    place.mkdir()
    codes = pa.list_(pa.from_numpy_dtype(dataset.info.dtype), dataset.info.num_tokens)
    schema = pa.schema(
        [("image_id", pa.string()), ("class_id", pa.int32()), ("variant", pa.string()), ("codes", codes)]
    )
    writers = [pa.ipc.new_stream(str(place / str(bucket)), schema) for bucket in range(buckets)]
    try:
        for name in dataset.keys:
            rows = dataset.read(name)
            table = pa.record_batch(
                [
                    pa.array(rows.image_id, pa.string()),
                    pa.array(rows.class_id),
                    pa.array(rows.variant, pa.string()),
                    pa.FixedSizeListArray.from_arrays(pa.array(rows.codes.reshape(-1)), type=codes),
                ],
                schema=schema,
            )
            bucket_n = np.array([bucket_of(image_id, buckets) for image_id in rows.image_id])
            for bucket in np.unique(bucket_n):
                writers[bucket].write_batch(table.take(pa.array(np.flatnonzero(bucket_n == bucket))))
            yield name
    finally:
        for writer in writers:
            writer.close()


def _unspill(path: Path) -> CodeRows:
    with pa.ipc.open_stream(str(path)) as reader:
        table = reader.read_all()
    codes = table["codes"].combine_chunks()
    return CodeRows(
        table["image_id"].to_pylist(),
        table["class_id"].to_numpy(),
        table["variant"].to_pylist(),
        codes.flatten().to_numpy().reshape(-1, table.schema.field("codes").type.list_size),
    )
