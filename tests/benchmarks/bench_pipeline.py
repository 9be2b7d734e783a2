"""Overhead of the pipeline: images/s of prepare and encode beside a bare loop, and memory as datasets grow.

The model is a small SFTok at 64 px, which prepare and decoding weigh on, and with `--full` SFTok-B at 256 px; images
are JPEGs in a folder. The bare loop has its images as floats in memory, in the same micro-batches, with one thread a
process, in as many processes as there are workers. `python -m tests.benchmarks pipeline --full` goes to a million rows.
"""

import functools
import io
import multiprocessing
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from infra.artifacts.manifest import ArtifactPlan, Manifest, publish
from infra.artifacts.shards import SHARD, put, shard_name, write_shard
from infra.codes.contract import CodesInfo
from infra.compute.cluster import session
from infra.compute.workers import WorkerOptions, map_shards
from infra.store.store import Store
from sftok.coding.encode import EncodeJob, ShardEncoder, encode
from sftok.config import AugmentConfig, DataConfig, TeacherConfig, TokenizerConfig, TransformerConfig
from sftok.images.contract import METADATA_KEY
from sftok.model.prepared import prepare_encoder
from sftok.model.tokenizer import SFTok
from sftok.prepare.prepare import prepare
from sftok.sources.sources import list_source
from sftok.weights.artifacts import save_tokenizer
from tests.benchmarks import models
from tests.benchmarks.table import percent, show

T = TypeVar("T")

SHARDS, VAL_SHARDS = 4, 2  # few: the last micro-batch of each is filled up
ROWS = (10_000, 100_000)
ROWS_A_SHARD = 5_000
STUB_SIZE = 16


class Case(NamedTuple):
    """A model, and as many images as take it some minutes."""

    name: str
    images: int
    size: int
    micro_batch: int
    build: Callable[[], SFTok]
    workers: tuple[int, ...]


SMALL = Case("SFTok of 10.6 M parameters", 3_072, models.SMALL_SIZE, 32, models.small_tokenizer, (1, 2))
BASE = Case("SFTok-B", 512, models.B_SIZE, 8, models.sftok_b, (2,))


def main() -> None:
    for case in (SMALL, BASE) if "--full" in sys.argv else (SMALL,):
        with tempfile.TemporaryDirectory() as place:
            speed(Path(place), case)
    for workers in (0, 1):
        grow(workers, (*ROWS, 1_000_000) if "--full" in sys.argv else ROWS)


# --- speed -----------------------------------------------------------------------------------------------------------


def speed(place: Path, case: Case) -> None:
    """Bare loop, encode, and prepare and encode; what starts only once (Ray, processes, the model) told apart."""
    data = draw(place / "data", case)
    model = case.build()
    save_tokenizer(model, Store(place / "tokenizer"))
    rows = []
    for workers in case.workers:
        with session(num_cpus=workers):
            store, options = Store(place / f"store-{workers}"), WorkerOptions(workers=workers)
            map_shards(nothing, ["x"], options=options)  # Ray is started once a run, whatever the dataset
            before = bare(place, workers, case)
            prepared, preparing = timed(functools.partial(prepared_images, store, data, options, case.size))
            job = job_of(store, prepared, place / "tokenizer", case.size, case.micro_batch, model.config)
            start = started(job, options)
            made, encoding = timed(functools.partial(encode, job, prepared, options=options))
            after = bare(place, workers, case)
        assert made.counts["rows"] == case.images
        reference = (before + after) / 2  # of a shared machine: around what is compared
        pure = case.images / (encoding - start)
        both = case.images / (encoding - start + preparing)
        figures = [f"{reference:.0f}", f"{pure:.0f}", percent(pure / reference), f"{both:.0f}"]
        spread, fill = percent(abs(before - after) / reference), filled_up(prepared, case.micro_batch)
        whole = [percent(rate * (1 + fill) / reference) for rate in (pure, both)]
        rows.append([f"{workers}", *figures, percent(both / reference), percent(fill), *whole, f"{start:.1f}", spread])
    columns = [
        "workers",
        "bare img/s",
        "encode img/s",
        "of bare",
        "prepare + encode",
        "of bare",
        "filled up",
        "encode without",
        "both without",
        "start s",
        "bare drift",
    ]
    show(
        f"pipeline: {case.images:,} images of {case.size} px, {case.name}, fp32, micro-batch {case.micro_batch}",
        columns,
        rows,
    )


def draw(folder: Path, case: Case) -> Path:
    pictures = (models.pictures(256, case.size) * 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    for number in range(case.images):
        path = folder / f"class {number % 4}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.roll(pictures[number % 256], number // 256, 1)).save(path, quality=90)
    return folder


def filled_up(images: Manifest, micro_batch: int) -> float:
    """Return the share of padding in the last micro-batches of shards; of shards of 2,500 it is nothing."""
    rows = [file.rows or 0 for file in images.files if SHARD.fullmatch(file.path)]
    return sum(-count % micro_batch for count in rows) / sum(rows)


def nothing() -> Callable[[str], str]:
    return str


def prepared_images(store: Store, data: Path, options: WorkerOptions, size: int) -> Manifest:
    config = DataConfig(image_size=size, num_shards=SHARDS, num_val_shards=VAL_SHARDS)
    plan = ArtifactPlan(kind="images", version=1, config={})
    made = prepare(list_source(str(data)), config, out=store.at(plan.prefix), options=options)
    return publish(store, plan, files=made.files, counts=made.counts, metrics={}, seconds=0)


def started(job: EncodeJob, options: WorkerOptions) -> float:
    """Seconds until workers have the model, without any shard of work."""
    return timed(lambda: map_shards(functools.partial(idle, job), list("ab")[: options.workers], options=options))[1]


def idle(job: EncodeJob) -> Callable[[str], str]:
    """A worker that has the model and does nothing."""
    ShardEncoder(job)
    return str


def bare(place: Path, processes: int, case: Case) -> float:
    """Images/s of the model alone, in so many processes at once."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(processes), context.Queue()
    running = [
        context.Process(target=loop, args=(str(place / "tokenizer"), case, barrier, results)) for _ in range(processes)
    ]
    for process in running:
        process.start()
    seconds = [results.get() for _ in running]
    for process in running:
        process.join()
    return processes * case.images / 2 / max(seconds)


def loop(tokenizer: str, case: Case, barrier: threading.Barrier, results: "multiprocessing.Queue[float]") -> None:
    from sftok.weights.artifacts import load_tokenizer

    torch.set_num_threads(1)
    encoder = prepare_encoder(load_tokenizer(Store(tokenizer)))
    parts = models.pictures(256, case.size).split(case.micro_batch)
    encoder(parts[0])
    barrier.wait()
    began = time.perf_counter()
    for number in range(case.images // 2 // case.micro_batch):
        encoder(parts[number % len(parts)])
    results.put(time.perf_counter() - began)


# --- memory ----------------------------------------------------------------------------------------------------------


def grow(workers: int, counts: tuple[int, ...]) -> None:
    """Peak memory of driver and workers while datasets of more and more rows are encoded by a model of no size."""
    rows, first = [], 0.0
    with tempfile.TemporaryDirectory() as place, session(num_cpus=max(workers, 1)):
        torch.manual_seed(0)
        part = TransformerConfig(width=8, layers=1, heads=1)
        config = TokenizerConfig(
            patch_size=8, num_latent_tokens=4, codebook_size=16, code_dim=4, encoder=part, decoder=part
        )
        teacher = TeacherConfig(base_channels=8, channel_multipliers=(1, 2), norm_groups=8)
        save_tokenizer(SFTok(config, teacher, STUB_SIZE, pixels=False), Store(place).at("tokenizer"))
        for count in (ROWS_A_SHARD, *counts):  # the first one loads the libraries
            store = Store(place).at(f"store-{count}")
            images = synthetic(store, count)
            job = job_of(store, images, Path(place) / "tokenizer", STUB_SIZE, 256, config)
            with peak() as found:
                made, seconds = timed(functools.partial(encode, job, images, options=WorkerOptions(workers=workers)))
            assert made.counts["rows"] == count
            if count == ROWS_A_SHARD:
                continue
            first = first or found[0]
            rows.append([f"{count:,}", f"{count / seconds:.0f}", f"{found[0]:.0f}", percent(found[0] / first - 1)])
            store.at("images").delete_tree()
    columns = ["rows", "img/s", "peak MB", "more than the first"]
    show(f"memory: a model of no size, {ROWS_A_SHARD:,} rows a shard, {workers} workers and the driver", columns, rows)


def synthetic(store: Store, count: int) -> Manifest:
    """Image shards of one picture over and over."""
    sink = io.BytesIO()
    Image.fromarray(np.zeros((STUB_SIZE, STUB_SIZE, 3), np.uint8)).save(sink, "PNG")
    plan, data = ArtifactPlan(kind="images", version=1, config={}), sink.getvalue()
    out, total, files = store.at(plan.prefix), count // ROWS_A_SHARD - 1, []
    names = [shard_name("val", 0, 1), *(shard_name("train", index, total) for index in range(total))]
    if not total:
        names.append(shard_name("train", 0, 1))
    each = count // len(names)
    for at, name in enumerate(names):
        ids = [f"{at:05d}/{row:05d}" for row in range(each)]
        images = pa.array([{"bytes": data, "path": image_id} for image_id in ids])
        table = pa.table({"image_id": ids, "image": images, "label": pa.nulls(each, pa.int64())})
        buffer = io.BytesIO()
        told = {METADATA_KEY: b'{"class_names": null, "split": "train"}'}
        pq.write_table(table.replace_schema_metadata(told), buffer, compression="zstd", row_group_size=256)
        files.append(write_shard(out, name, buffer.getvalue(), each))
    files.append(put(out, "rejects.parquet", b""))
    counts = {"train": each * (len(names) - 1), "val": each}
    return publish(store, plan, files=files, counts=counts, metrics={}, seconds=0)


@contextmanager
def peak() -> Iterator[list[float]]:
    """The largest sum of the private memory of this process and its workers during the block, in MB."""
    found, over = [0.0], threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            found[0] = max(found[0], memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    yield found
    over.set()
    watcher.join()


def memory() -> float:
    own = psutil.Process()
    workers = [p for p in own.children(recursive=True) if _is_worker(p)]
    return sum(_resident(process) for process in [own, *workers]) / 1e6


def _is_worker(process: psutil.Process) -> bool:
    try:
        return "ray::_Actor" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def _resident(process: psutil.Process) -> float:
    try:
        info = process.memory_info()
    except psutil.Error:
        return 0.0
    return float(info.rss - info.shared)


# --- both ------------------------------------------------------------------------------------------------------------


def job_of(
    store: Store, images: Manifest, tokenizer: Path, size: int, micro_batch: int, config: TokenizerConfig
) -> EncodeJob:
    info = CodesInfo(
        tokenizer="0" * 32,
        codebook_size=config.codebook_size,
        num_tokens=config.num_latent_tokens,
        image_size=size,
        assignment="nearest",
        precision="fp32",
        class_names=None if size == STUB_SIZE else tuple(f"class {n}" for n in range(4)),
    )
    folder, views = store.at(images.plan.prefix), {"train": ("center",), "val": ("center",)}
    return EncodeJob(folder, Store(tokenizer), store.at("codes"), info, views, AugmentConfig(), micro_batch)


def timed(call: Callable[[], T]) -> tuple[T, float]:
    began = time.perf_counter()
    made = call()
    return made, time.perf_counter() - began


if __name__ == "__main__":
    main()
