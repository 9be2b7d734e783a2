"""Measure what docs/explanation/scale.md states: driver time per shard, manifests, and rates of a small S3 server."""

import contextlib
import functools
import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from infra.artifacts.manifest import ArtifactPlan, Manifest, publish
from infra.artifacts.pages import PAGE_ENTRIES, PagedEntries, write_page
from infra.artifacts.shards import FileEntry, put, shard_entry, shard_name, write_shard
from infra.artifacts.verify import DuplicateIndex
from infra.compute.cluster import session
from infra.compute.workers import WorkerOptions, map_shards
from infra.store.s3 import Bucket
from infra.store.store import Store
from sftok.coding.groups import GROUPS
from sftok.config import DataConfig
from sftok.prepare.plan import plan_shards
from sftok.sources.files import FolderReader
from sftok.sources.listing import Entry, Source, collect
from tests.benchmarks.bench_prepare import peak_bytes
from tests.benchmarks.table import show
from tests.support.s3_server import running_server

SHARDS = (5_000, 20_000)
WAITING = (2, 8, 800, 8_000)  # calls that the driver waits for at once
ROUNDS = 20
GROUP = 256  # images in a row group of image Parquet
LISTED = (250_000, 1_000_000, 4_000_000)
ENTRIES = (1_000, 10_000, 100_000)
GROUP_SHARDS = 1_000_000 // GROUPS


def main() -> None:
    manifests()
    paged()
    publishing()
    driver()
    waiting()
    dealing()
    verification()
    server()


def entries(count: int) -> tuple[FileEntry, ...]:
    return tuple(
        FileEntry(
            path=shard_name("train", n % 100_000, max(count, 1) % 100_000),
            size=1_000_000 + n,
            sha256=hashlib.sha256(str(n).encode()).hexdigest(),
            rows=10_000,
        )
        for n in range(count)
    )


def taken(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def manifests() -> None:
    """The manifest of a dataset of so many shards: what publishing writes, and what every later stage reads."""
    rows: list[list[object]] = []
    for count in ENTRIES:
        manifest = empty().model_copy(update={"files": entries(count)})
        text = manifest.model_dump_json(indent=1).encode()
        dense = manifest.model_dump_json().encode()
        process, before = psutil.Process(), psutil.Process().memory_info().rss
        write = taken(lambda manifest=manifest: manifest.model_dump_json(indent=1))
        started = time.perf_counter()
        parsed = Manifest.model_validate_json(text)
        read = time.perf_counter() - started
        memory = process.memory_info().rss - before
        assert len(parsed.files) == count
        sizes = [f"{len(text) / 1e6:.1f}", f"{len(text) / count:.0f}", f"{len(dense) / count:.0f}"]
        rows.append([f"{count:,}", *sizes, f"{write:.3f}", f"{read:.3f}", f"{memory / 1e6:.0f}"])
    columns = ["files", "MB", "bytes a file", "without indent", "write s", "parse s", "memory MB"]
    show("manifest.json", columns, rows)


def empty() -> Manifest:
    """A manifest that lists nothing."""
    with tempfile.TemporaryDirectory() as place:
        plan = ArtifactPlan(kind="codes", version=1, config={})
        return publish(Store(place), plan, files=[], counts={}, metrics={}, seconds=0)


def paged() -> None:
    """A million shards in pages: those of a manifest that was published whole, and those that groups of 30 leave."""
    rows, shards = [], 1_000_000
    for size in (PAGE_ENTRIES, GROUP_SHARDS):
        with tempfile.TemporaryDirectory() as place:
            folder = Store(place).at("artifacts")
            count = min(shards, 2_000 * size)  # so many pages tell what one costs
            some = [write_page(folder, entries(size)) for _ in range(2)]
            pages = tuple(some[at % 2] for at in range(shards // size))
            manifest = empty().model_copy(update={"pages": pages})
            text = manifest.model_dump_json(indent=1).encode()
            read = taken(lambda text=text: Manifest.model_validate_json(text))
            listed = PagedEntries(folder, pages[: count // size])
            going = taken(lambda listed=listed: sum(entry.size for entry in listed)) / len(listed.pages) * len(pages)
        rows.append([f"{size:,}", f"{len(pages):,}", f"{len(text) / 1e6:.2f}", f"{read:.3f}", f"{going:.0f}"])
    columns = ["shards a page", "pages", "manifest MB", "read, s", "all entries gone through, s, local folder"]
    show("a million shards in pages", columns, rows)


def publishing() -> None:
    """What publish does besides writing: it looks for files that are listed twice or missing."""
    rows = []
    for count in ENTRIES:
        with tempfile.TemporaryDirectory() as place:
            store, files = Store(place), entries(count)
            plan = ArtifactPlan(kind="codes", version=1, config={})
            for entry in files:
                key = store.path / plan.prefix / entry.path
                key.parent.mkdir(parents=True, exist_ok=True)
                key.touch()
            seconds = taken(
                lambda store=store, plan=plan, files=files: publish(
                    store, plan, files=files, counts={}, metrics={}, seconds=0
                )
            )
        rows.append([f"{count:,}", f"{seconds:.3f}"])
    show("publish, local folder", ["files", "s"], rows)


def driver() -> None:
    """map_shards with work that does nothing: what is left is the driver's."""
    rows = []
    for count in SHARDS:
        process, before = psutil.Process(), psutil.Process().cpu_times()
        with tempfile.TemporaryDirectory() as place:
            work = functools.partial(Trivial, place)
            names = [shard_name("train", n, count) for n in range(count)]
            memory = process.memory_info().rss
            seconds = taken(lambda work=work, names=names: map_shards(work, names, options=WorkerOptions(workers=2)))
            few = names[:2]
            short = taken(lambda work=work, few=few: map_shards(work, few, options=WorkerOptions(workers=2)))
        after = process.cpu_times()
        cpu = after.user + after.system - before.user - before.system
        net = (seconds - short) / count * 1e3
        grown = (process.memory_info().rss - memory) / 1e6
        rows.append(
            [f"{count:,}", f"{seconds:.1f}", f"{short:.1f}", f"{net:.2f}", f"{cpu / count * 1e3:.2f}", f"{grown:.0f}"]
        )
    columns = ["shards", "s", "start and stop, s", "ms a shard", "driver's CPU ms a shard", "memory MB"]
    show("map_shards, 2 Ray workers on this machine, work that does nothing", columns, rows)


def waiting() -> None:
    """Measure one look at the pool while many workers are busy."""
    rows = []
    with session() as connection:
        ray = connection.connect(cpus=1, gpus=0, processes=1)
        done = ray.put(1)
        for count in WAITING:
            actor = ray.remote(num_cpus=0)(Sleeper).remote()
            calls = [actor.sleep.remote() for _ in range(count - 1)]
            look = taken(lambda calls=calls: [ray.wait([*calls, done], num_returns=1) for _ in range(ROUNDS)])
            rows.append([f"{count:,}", f"{look / ROUNDS * 1e3:.2f}"])
            ray.kill(actor)
    show("ray.wait for the first of so many calls", ["calls", "ms"], rows)


class Sleeper:
    """A worker that is at work all the time."""

    def sleep(self) -> None:
        time.sleep(3600)


class Trivial:
    """A worker that returns an entry, as encode does."""

    def __init__(self, place: str) -> None:
        self.place = place

    def __call__(self, name: str) -> FileEntry:
        return FileEntry(path=name, size=1_000_000, sha256="0" * 64, rows=10_000)


def dealing() -> None:
    """What prepare spends on an entry before an image is read, and whether a process holds all of them."""
    rows = []
    for count in LISTED:
        command = [sys.executable, "-m", "tests.benchmarks.bench_scale", "deal", str(count)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        listing, digest, planning, megabytes, disk = json.loads(done.stdout.splitlines()[-1])
        per_second = [f"{count / taken_here / 1e6:.2f}" for taken_here in (listing, digest, planning)]
        rows.append([f"{count:,}", *per_second, f"{megabytes:.0f} MB", f"{disk / count:.0f}"])
    columns = ["entries", "listed, M/s", "digest, M/s", "dealt and gathered, M/s", "peak", "bytes of disk an entry"]
    show("prepare's listing, in one process (peak is above that of a listing of 1,000)", columns, rows)


def deal(count: int) -> None:
    """List, hash and deal so many made-up entries; seconds of each, the peak above a short run's, bytes written."""
    config = DataConfig(image_size=8, num_shards=1024, num_val_shards=64)
    with tempfile.TemporaryDirectory() as place:
        for many in (1_000, count):
            before, folder = peak_bytes(), Store(place).at(str(many))
            started = time.perf_counter()
            ids = (f"n{n // 1300:08d}/n{n // 1300:08d}_{n}.JPEG" for n in range(many))
            made = (Entry(image_id=i, size=110_000, version=f"{17 * n}", class_name=i[:9]) for n, i in enumerate(ids))
            source = Source("made up", collect(made), ("a",), FolderReader("/nowhere"))
            listed = time.perf_counter()
            assert source.digest
            hashed = time.perf_counter()
            plan = plan_shards(source, config, folder=folder)
            dealt = time.perf_counter()
            assert sum(len(job.entries) for job in plan.jobs) == many
            disk = sum(path.stat().st_size for path in folder.path.rglob("*") if path.is_file())
    numbers = [listed - started, hashed - listed, dealt - hashed, (peak_bytes() - before) / 1e6, disk]
    sys.stdout.write(json.dumps(numbers) + "\n")


def verification() -> None:
    """Measure the time of sftok verify per byte and per row."""
    count, block = 200_000, os.urandom(1 << 20)
    hashing = 64 / taken(lambda: [hashlib.sha256(block) for _ in range(64)]) * len(block) / 1e6
    index = DuplicateIndex()
    keys = [f"n{n:08d}/n{n:08d}_{n}.JPEG" for n in range(count)]
    adding = taken(lambda: index.add("train-00000-of-00512.parquet", keys))
    asking = taken(lambda: list(index.duplicates()))
    pages, size = (index._db.execute(f"pragma {name}").fetchone()[0] for name in ("page_count", "page_size"))
    cells = [
        f"{hashing:.0f}",
        f"{count / adding / 1e6:.2f}",
        f"{count / asking / 1e6:.2f}",
        f"{pages * size / count:.0f}",
    ]
    columns = ["", "SHA-256, MB/s", "index: rows in, M/s", "rows compared, M/s", "bytes of disk a row"]
    show("verify", columns, [["", *cells]])


def requests(folder: Store) -> dict[str, int]:
    """Requests to S3 for one image shard of ten row groups: read, and answered by a code shard."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image_id", pa.string()), ("image", image), ("label", pa.int64()), ("sha256", pa.string())])
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, schema, compression="zstd", use_dictionary=False) as writer:
        for group in range(10):
            images = [{"bytes": os.urandom(20_000), "path": f"{n}"} for n in range(GROUP)]
            rows = [{"image_id": f"{group}-{n}", "image": image} for n, image in enumerate(images)]
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    name, out = shard_name("train", 0, 1), folder.at("codes")
    folder.write(name, sink.getvalue())
    made = {}
    with counted() as calls:
        shard_entry(out, name)
        made["look whether it is done"] = len(calls)
    for what, is_ahead in (("ahead, as Arrow does by default", True), ("a row group at a time", False)):
        with counted() as calls, folder.open(name) as opened, pq.ParquetFile(opened, pre_buffer=is_ahead) as parquet:
            for _ in parquet.iter_batches(batch_size=64, columns=["image_id", "image", "label"]):
                pass
            made[f"read ten row groups of 5 MB {what}"] = len(calls)
    with counted() as calls:
        write_shard(out, name, b"codes", 1)
        made["write a code shard and its sidecar"] = len(calls)
    return made


@contextlib.contextmanager
def counted() -> Iterator[list[str]]:
    """Every call that goes to the server."""
    calls: list[str] = []
    run = Bucket._run

    def noted(self: Bucket, key: str, call: Callable[..., object]) -> object:
        calls.append(key)
        return run(self, key, call)

    Bucket._run = noted  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        Bucket._run = run  # type: ignore[method-assign]


def server() -> None:
    """A SeaweedFS of one process on this machine: orders of size alone."""
    data, rows = os.urandom(4096), []
    with tempfile.TemporaryDirectory() as place, running_server(Path(place)) as running:
        os.environ.update(running.environment)
        folder = Store("s3://tests/scale")
        count = 300
        names = [f"x-{n:05d}" for n in range(count)]
        folder.exists("connect")
        rows.append(["put of 4 kB, one after another", count / taken(lambda: [folder.write(n, data) for n in names])])
        with ThreadPoolExecutor(16) as pool:
            rows.append(
                ["put, 16 at once", count / taken(lambda: list(pool.map(lambda n: put(folder, n, data), names)))]
            )
        shards = [shard_name("train", n, count) for n in range(count)]
        rows.append(["shard and sidecar", count / taken(lambda: [write_shard(folder, n, data, 1) for n in shards])])
        rows.append(["get of 4 kB", count / taken(lambda: [folder.read(n) for n in names])])
        asked = requests(Store("s3://tests/requests"))
        listed = len(folder.list())
        rows.append([f"keys listed ({listed})", listed / taken(folder.list)])
    show("S3 test server", ["", "a second"], [[name, f"{rate:.0f}"] for name, rate in rows])
    show("requests for one shard", ["", "requests"], [[name, str(count)] for name, count in asked.items()])


if __name__ == "__main__":
    sys.exit(deal(int(sys.argv[2])) if sys.argv[1:2] == ["deal"] else main())
