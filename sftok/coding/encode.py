"""Encode images to codes: every image shard becomes the code shard of the same name.

Exactly once, because a shard is a function of its images alone, its sidecar is created once and after it, and nothing
is published before the counts match: images x views = rows + failed.
"""

import dataclasses
import functools
import io
import itertools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from infra.artifacts.manifest import Manifest, shards_in
from infra.artifacts.pages import Page
from infra.artifacts.shards import FileEntry, put
from infra.compute.device import default_device
from infra.compute.workers import WorkerOptions, map_shards
from infra.progress import Progress, silent
from sftok.coding.groups import GROUPS, GroupEncoder, Groups, Totals, finished_group, sum_of, total_of
from sftok.coding.shard import (
    CodeShard,
    EncodeJob,
    RunEncoder,
    ShardEncoder,
    encode_batches,
    encode_images,
    find_shard,
)
from sftok.images.dataset import ImageRows, variant_images
from sftok.images.decode_ahead import batched, spare_processes
from sftok.images.views import has_crops, ten_crop_side

__all__ = [
    "FAILED",
    "CodeShard",
    "EncodeJob",
    "EncodeResult",
    "ShardEncoder",
    "encode",
    "encode_batches",
    "encode_images",
]

FAILED = "failed.parquet"
FAILED_SCHEMA = pa.schema([("image_id", pa.string()), ("variant", pa.string()), ("reason", pa.string())])
RUN = 16  # largest number of shards per call of a GPU's worker: some seconds of work
LOOKUPS = 32  # shards or groups looked up concurrently: on S3 each takes a request or two


class EncodeResult(NamedTuple):
    """Files and counts of an encoding: images x views = rows + failed."""

    files: list[FileEntry]
    counts: dict[str, int]  # shards, reused (of them, from other versions), rows, failed (views)
    pages: tuple[Page, ...] = ()  # lists of the shards, if they are too many for `files`


def encode(
    job: EncodeJob,
    images: Manifest,
    *,
    options: WorkerOptions,
    progress: Progress = silent,
    group: int | None = None,
) -> EncodeResult:
    """Encode every shard of an images artifact that is neither done nor cached in other versions of the dataset.

    Workers get groups of shards, and finished groups are marked, too, so that of a million shards the driver and a
    restart see only the groups. Up to 65,535 shards, a group is one shard, and its sidecar is the mark.

    Args:
        job: parameters of all workers.
        images: manifest of the images.
        options: workers; change no byte.
        progress: called with the number of shards done, or of groups if they hold several shards.
        group: shards per group; None for some 32,768 groups.

    Raises:
        ValueError: a view is unknown, an image shard is damaged, or the counts do not match.
        TransientError: workers were lost for good, or ran out of memory.
    """
    shards, job = shards_in(job.images, images), dataclasses.replace(job, decoders=_decoders(job, options))
    _check_variants(job)
    size = group or max(1, len(shards) // GROUPS)
    if size > 1:
        pages, totals = _encode_groups(job, shards, size, options, progress)
        files: list[FileEntry] = []
    else:
        pages, made = (), _encode_shards(job, shards, options, progress)
        totals = total_of(job, made)
        files = [shard.file for shard in made]
    counts = {"shards": len(shards), "reused": totals.reused, "rows": totals.rows, "failed": len(totals.failed)}
    _check_counts(job, images, counts)
    if totals.failed:
        files.append(put(job.out, FAILED, _failed_parquet(totals.failed), len(totals.failed)))
    return EncodeResult(files, counts, pages)


def _encode_shards(
    job: EncodeJob, shards: Sequence[FileEntry], options: WorkerOptions, progress: Progress
) -> list[CodeShard]:
    """Encode shards one by one or in runs, in the order of `shards`; finished ones are looked up by the driver."""
    with ThreadPoolExecutor(LOOKUPS) as pool:
        found = list(pool.map(functools.partial(find_shard, job), shards))
    missing = [entry for entry, shard in zip(shards, found, strict=True) if shard is None]
    runs, after = list(batched(missing, _run(len(missing), job, options))), _after(progress, len(shards) - len(missing))
    work = functools.partial(RunEncoder, job)
    made = itertools.chain.from_iterable(map_shards(work, runs, options=options, progress=_of_runs(after, runs)))
    return [shard or next(made) for shard in found]


def _is_on_gpus(job: EncodeJob, options: WorkerOptions) -> bool:
    return options.gpus_per_worker > 0 if options.workers else (job.device or default_device()).startswith("cuda")


def _decoders(job: EncodeJob, options: WorkerOptions) -> int:
    """Choose a worker's decoding processes: one per core, if it has a GPU and more cores than threads would use.

    Its cores are those that it reserves, or else its share of this machine's.
    """
    if job.decoders is not None:
        return job.decoders
    if not _is_on_gpus(job, options):
        return 0
    if options.workers and options.cpus_per_worker > 1:
        return spare_processes(cores=int(options.cpus_per_worker))
    return spare_processes(max(options.workers, 1))


def _run(count: int, job: EncodeJob, options: WorkerOptions) -> int:
    """Choose the shards per call: on GPUs several overlapping ones, with some calls per worker; else one."""
    if not _is_on_gpus(job, options):
        return 1
    return max(1, min(RUN, count // (4 * max(options.workers, 1))))


def _of_runs(progress: Progress, runs: Sequence[Sequence[FileEntry]]) -> Progress:
    """Report runs as the shards in them, as if they ended in order; all runs but the last one are equally long."""
    ends = [0, *itertools.accumulate(len(run) for run in runs)]

    def listen(done: int, total: int, figures: Mapping[str, float]) -> None:
        per_call = ends[done] / max(done, 1)
        progress(ends[done], ends[total], {name: value * per_call for name, value in figures.items()})

    return listen


def _encode_groups(
    job: EncodeJob, shards: Sequence[FileEntry], size: int, options: WorkerOptions, progress: Progress
) -> tuple[tuple[Page, ...], Totals]:
    """Encode groups of `size` shards; finished shards of an unfinished group are looked up by its worker."""
    groups = Groups(shards, size)
    with ThreadPoolExecutor(LOOKUPS) as pool:
        found = list(pool.map(lambda number: finished_group(job.out, groups.name(number)), groups.numbers))
    missing = Groups(shards, size, [number for number, record in enumerate(found) if record is None])
    work, after = functools.partial(GroupEncoder, job), _after(progress, len(groups) - len(missing))
    made = iter(map_shards(work, missing, options=options, progress=after))
    records = [record or next(made) for record in found]
    return tuple(record.page for record in records), sum_of(record.totals for record in records)


def _check_variants(job: EncodeJob) -> None:
    """Check before workers start that all views can be made."""
    any_image = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    row = ImageRows([""], any_image, torch.zeros(1, dtype=torch.int64), larger=any_image)
    variants = {variant for variants in job.variants.values() for variant in variants}
    for variant in variants:
        variant_images(row, variant, job.augment)
    if has_crops(variants):
        ten_crop_side(job.info.image_size, job.ten_crop_resize)


def _check_counts(job: EncodeJob, images: Manifest, counts: Mapping[str, int]) -> None:
    """Check that no view is missing or repeated."""
    splits = {split: images.counts[split] for split in job.variants}
    expected = sum(count * len(job.variants[split]) for split, count in splits.items())
    if expected != counts["rows"] + counts["failed"]:
        product = " + ".join(f"{count} {split} x {len(job.variants[split])}" for split, count in splits.items())
        raise ValueError(
            f"images/{images.digest} x views = {product} = {expected}, but {job.out.uri} has {counts['rows']} rows"
            f" + {counts['failed']} failed = {counts['rows'] + counts['failed']}: delete both folders and run again"
        )


def _after(progress: Progress, before: int) -> Progress:
    """Report progress including the shards that were done before."""

    def listen(done: int, total: int, figures: Mapping[str, float]) -> None:
        progress(before + done, before + total, figures)

    return listen


def _failed_parquet(failed: Sequence[tuple[str, str, str]]) -> bytes:
    columns = zip(*sorted(failed), strict=True)
    sink = io.BytesIO()
    pq.write_table(pa.table([pa.array(column, pa.string()) for column in columns], FAILED_SCHEMA), sink)
    return sink.getvalue()
