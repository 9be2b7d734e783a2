"""Prepare a source as image Parquet: every entry is read once, decoded to check it, and stored unchanged.

Or, with `data.store_size`, stored resized: its sha256, width and height are then those of the resized file.

A shard is a bucket of the hash of the image id, so the same images make the same files in any listing order and with
any number of workers, and a new image changes one file. The files, with rows sorted by image id:

    train-00000-of-00008.parquet ...  image_id, image {bytes, path}, label, width, height, sha256
    val-00000-of-00004.parquet ...
    rejects.parquet                   path, reason, size

If images are in tars or Parquet, workers first list these (`sftok.sources.containers`); the entries are dealt to their
shards (`deal`); then workers make one shard each, from the files or ranges of files that its entries name. A worker
holds one shard, the driver two kilobytes per shard. Finished shards have a sidecar and are not made again.
"""

import collections
import dataclasses
import functools
import io
import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra.artifacts import set_hash
from infra.artifacts.shards import FileEntry, put, split_of
from infra.compute.workers import WorkerOptions, map_shards
from infra.progress import Progress, silent
from infra.store.store import Store
from sftok.config import DataConfig
from sftok.images.contract import SPLITS
from sftok.prepare.plan import plan_shards
from sftok.prepare.shard import REJECTED, ShardResult, ShardWriter
from sftok.sources.containers import BYTES, name_classes, open_containers
from sftok.sources.listing import Source, values
from sftok.sources.rules import LEFT_OUT, shown

__all__ = ["REJECTS", "PrepareResult", "prepare"]

log = logging.getLogger(__name__)

REJECTS = "rejects.parquet"
OPENED = "opened"  # folder of the listings of containers, until the source is prepared
RATE_FROM = 1_000  # entries; one broken file of ten is no evidence
HERE = WorkerOptions()


class PrepareResult(NamedTuple):
    """Files and counts of prepared images: found = accepted + rejected, and accepted = train + val.

    The rejected include what is left out by rule, such as hidden files.
    """

    counts: dict[str, int]  # found, accepted, rejected, left_out, train, val, classes
    content_digest: str  # of class names, and of the set of [image id, sha256 in hex, label, split]
    files: list[FileEntry]


def prepare(
    source: Source,
    config: DataConfig,
    *,
    out: Store,
    progress: Progress = silent,
    options: WorkerOptions = HERE,
) -> PrepareResult:
    """Write the source's images as Parquet shards to the folder `out`; finished shards of a killed run are reused.

    Args:
        source: from `list_source`.
        config: shards, splits and limits.
        out: the folder.
        progress: called with the number of containers listed, then of images.
        options: workers; change no byte.

    Raises:
        ValueError: a split or a class has no usable image, or too many entries are rejected; rejects.parquet is
            written nevertheless.
        TransientError: storage or workers failed.
    """
    is_contained = bool(source.containers)
    if is_contained:
        source = open_containers(source, folder=out.at(OPENED), options=options, progress=progress)
    plan = plan_shards(source, config, folder=out.at(OPENED), options=options, progress=progress)
    if is_contained:
        source = name_classes(source, plan.class_names, config)
    found, source = len(source.entries), dataclasses.replace(source, entries=())
    work = functools.partial(ShardWriter, source, config, out)
    results = map_shards(work, plan.jobs, options=options, progress=_of_images(progress, found))
    for done in (plan.jobs.deal.folder, out.at(OPENED, BYTES)):
        done.delete_tree()
    rejects = pa.concat_tables([result.rejects for result in results]).sort_by(
        [(name, "ascending") for name in REJECTED.names]
    )
    files = [result.file for result in results]
    accepted = sum(file.rows or 0 for file in files)
    assert accepted + len(rejects) == found, "an entry is neither accepted nor rejected"
    files.append(put(out, REJECTS, _rejects_parquet(rejects), len(rejects)))
    left_out = sum(reason in LEFT_OUT for reason in values(rejects["reason"]))
    _check_rate(source, found - left_out, rejects, config, out)
    _check_usable(source, results, rejects)
    out.at(OPENED).delete_tree()
    train = sum(file.rows or 0 for file in files if split_of(file.path) == "train")
    counts = {
        "found": found,
        "accepted": accepted,
        "rejected": len(rejects),
        "left_out": left_out,
        "train": train,
        "val": accepted - train,
        "classes": len(source.class_names or ()),
    }
    images = set_hash.join(result.images for result in results)
    return PrepareResult(counts, set_hash.digest(json.dumps(source.class_names).encode() + b"\n", images), files)


def _of_images(progress: Progress, found: int) -> Progress:
    """Report shards as the images that they hold on average."""

    def listen(done: int, total: int, figures: Mapping[str, float]) -> None:
        progress(found * done // total, found, figures)

    return listen


def check_reject_rate(counts: Mapping[str, int], config: DataConfig, where: str) -> None:
    """Check prepared images against the current `max_reject_rate`, which may be lower than when they were prepared.

    Raises:
        ValueError: the share of rejected entries is higher.
    """
    left_out = counts.get("left_out", 0)
    found, rejected = counts.get("found", 0) - left_out, counts.get("rejected", 0) - left_out
    if found >= RATE_FROM and rejected > config.max_reject_rate * found:
        raise ValueError(
            f"{where}: {rejected:,} of {found:,} entries were rejected, a share of {rejected / found:.3g} above "
            f"data.max_reject_rate = {config.max_reject_rate:g}: see its {REJECTS}; mend the source, or raise the rate"
        )


def _check_rate(source: Source, found: int, rejects: pa.Table, config: DataConfig, out: Store) -> None:
    """Check that a large source has few rejected entries; many suggest a mistake rather than noise."""
    reasons = [reason for reason in values(rejects["reason"]) if reason not in LEFT_OUT]
    if found < RATE_FROM or len(reasons) <= config.max_reject_rate * found:
        return
    alike = collections.Counter(map(gist, reasons))
    commonest = "; ".join(f"{count:,} x {gist}" for gist, count in alike.most_common(3))
    raise ValueError(
        f"source {source.uri!r}: {len(reasons):,} of {found:,} entries are rejected, a share of "
        f"{len(reasons) / found:.3g} above data.max_reject_rate = {config.max_reject_rate:g} ({commonest}): "
        f"see {out.uri}/{REJECTS}; mend the source, or raise data.max_reject_rate"
    )


def gist(reason: str) -> str:
    """Normalise a reason, so that those of different files are equal."""
    return re.sub(r"'[^']*'", "'...'", re.sub(r"[0-9]+", "N", reason))[:120]


def _check_usable(source: Source, results: Sequence[ShardResult], rejects: pa.Table) -> None:
    """Check that every split, and every class in train, has a usable image."""
    example = ""
    is_bad = pc.invert(pc.is_in(rejects["reason"], pa.array(sorted(LEFT_OUT), rejects["reason"].type)))
    for first in rejects.filter(is_bad).slice(0, 1).to_pylist():
        example = f" (rejected: {shown(first['path'])}, {first['reason'][:200]})"
    for split in SPLITS:
        if not any(result.file.rows for result in results if split_of(result.file.path) == split):
            raise ValueError(f"source {source.uri!r} has no usable image in {split}{example}: add images")
    train = (result.labels for result in results if split_of(result.file.path) == "train")
    labels = functools.reduce(int.__or__, train, 0)
    names = source.class_names or ()
    missing = [name for label, name in enumerate(names) if not labels >> label & 1]
    if missing and source.is_declared:
        log.warning("source %s: %d of %d classes have no image in train", source.uri, len(missing), len(names))
    elif missing:
        raise ValueError(
            f"source {source.uri!r}: class {shown(missing[0])} has no usable image in train{example}:"
            " add images to it, remove it, or lower data.val_fraction"
        )


def _rejects_parquet(rejects: pa.Table) -> bytes:
    schema = pa.schema([("path", pa.string()), ("reason", pa.string()), ("size", pa.int64())])
    sink = io.BytesIO()
    pq.write_table(rejects.cast(schema), sink, compression="zstd")
    return sink.getvalue()
