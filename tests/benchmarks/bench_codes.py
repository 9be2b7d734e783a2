"""Code Parquet at the size of ImageNet: bytes an image against bits and entropy, rows/s, and the memory of loading."""

import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infra.codes import contract
from infra.codes.contract import CodeRows, CodesInfo, from_parquet, to_parquet
from infra.store.store import Store
from tests.benchmarks.table import show, times

ROWS, TOKENS, CODEBOOK = 1_280_000, 64, 8192
SAMPLE = 320_000  # rows that layouts are compared on
PACKED = TOKENS * 13 / 8  # bytes an image
SPLIT, DELTA = "BYTE_STREAM_SPLIT", "DELTA_BINARY_PACKED"
INFO = CodesInfo(
    tokenizer="0" * 32,
    codebook_size=CODEBOOK,
    num_tokens=TOKENS,
    image_size=256,
    assignment="nearest",
    precision="bf16",
    class_names=tuple(f"class {number}" for number in range(1000)),
)
LOAD = """
import json, re, sys, time
from pathlib import Path
import psutil
from infra.codes.contract import load_codes
from infra.store.store import Store
folder, names, with_ids = Store(sys.argv[1]), sys.argv[3:], sys.argv[2] == "ids"
load_codes(folder, names[:1], with_ids=with_ids)  # maps the libraries, 75 MB of code that are no data
before, started = psutil.Process().memory_info().rss, time.perf_counter()
info, arrays = load_codes(folder, names, with_ids=with_ids)
seconds = time.perf_counter() - started
# Not getrusage: its peak is inherited from the process that started this one.
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
size = sum(array.nbytes for array in arrays if array is not None)
print(json.dumps([len(arrays.codes), size, peak - before, seconds]))
"""


def main() -> None:
    random = np.random.default_rng(0)
    drawn = {"uniform": (uniform(random, SAMPLE), PACKED)}
    drawn |= {f"Zipf {power}": zipf(random, SAMPLE, power) for power in (0.7, 1.0)}
    compare_layouts(drawn)
    compare_groups(rows_of(drawn["uniform"][0]))
    load()


def uniform(random: np.random.Generator, rows: int) -> Any:
    return random.integers(0, CODEBOOK, (rows, TOKENS)).astype(np.uint16)


def zipf(random: np.random.Generator, rows: int, power: float) -> tuple[Any, float]:
    """Codes in no order of frequency, and the bytes an image that no code without context can beat."""
    p = 1 / np.arange(1, CODEBOOK + 1) ** power
    p /= p.sum()
    drawn = np.searchsorted(np.cumsum(p), random.random((rows, TOKENS))).clip(0, CODEBOOK - 1)
    return random.permutation(CODEBOOK)[drawn].astype(np.uint16), float(-(p * np.log2(p)).sum()) * TOKENS / 8


def rows_of(codes: Any) -> CodeRows:
    """Two views an image under names like ImageNet's, a shard's share of them."""
    random, count = np.random.default_rng(1), len(codes) // 2
    synsets = np.sort(random.choice(15_000_000, 1000, replace=False))
    classes = np.sort(random.integers(0, 1000, count)).astype(np.int32)
    numbers = random.choice(10_000_000, count, replace=False)
    names = [f"n{synset:08d}" for synset in synsets[classes]]
    ids = [f"{name}/{name}_{number}.JPEG" for name, number in zip(names, numbers, strict=True)]
    return CodeRows(ids * 2, np.tile(classes, 2), ["center"] * count + ["flip"] * count, codes)


def compare_layouts(drawn: dict[str, tuple[Any, float]]) -> None:
    kind = pa.list_(pa.field("element", pa.uint16(), nullable=False), TOKENS)
    rows: list[list[object]] = []
    for encoding in ("dictionary", SPLIT, DELTA, "PLAIN"):
        for level in (1, 3, 9):
            cells: list[object] = [f"{encoding}, zstd {level}"]
            for codes, bound in drawn.values():
                table = pa.table({"codes": pa.FixedSizeListArray.from_arrays(pa.array(codes.reshape(-1)), type=kind)})
                how: dict[str, Any] = {"use_dictionary": True}
                if encoding != "dictionary":
                    how = {"use_dictionary": False, "column_encoding": {"codes.list.element": encoding}}
                how |= {"compression": "zstd", "compression_level": level, "row_group_size": contract._ROWS_PER_GROUP}
                data, write = timed(lambda table=table, how=how: parquet(table, how))
                _, read = timed(lambda data=data: pq.ParquetFile(io.BytesIO(data)).read())
                size = len(data) / SAMPLE
                cells.append(f"{size:.1f} ({times(size / bound)}) {SAMPLE / write / 1e6:.1f} {SAMPLE / read / 1e6:.1f}")
            rows.append(cells)
    columns = ["codes alone", *(f"{name}: bytes (of {bound:.1f}) write read" for name, (_, bound) in drawn.items())]
    show("bytes an image, of 104 packed bytes or of the entropy; M rows/s written and read", columns, rows)


def parquet(table: pa.Table, how: dict[str, Any]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **how)
    return sink.getvalue()


def timed(call: Callable[[], Any], rounds: int = 2) -> tuple[Any, float]:
    """The result, and the best of a few times."""
    best = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        made = call()
        best = min(best, time.perf_counter() - started)
    return made, best


def compare_groups(rows: CodeRows) -> None:
    """Row groups and encodings of the ids: size, and how long it takes to find one image."""
    table = pq.read_table(io.BytesIO(to_parquet(INFO, rows)))
    wanted = table["image_id"][len(table) // 3].as_py()
    made: list[list[object]] = []
    with tempfile.TemporaryDirectory() as place:
        for ids in ("PLAIN", "dictionary", "DELTA_BYTE_ARRAY"):
            for group in (4096, 16_384, 65_536, 262_144):
                path = Path(place) / f"{ids}-{group}.parquet"
                dictionaries = [*contract._LAYOUT["use_dictionary"], *(["image_id"] if ids == "dictionary" else [])]
                encodings = {**contract._LAYOUT["column_encoding"], "image_id": ids}
                if ids == "dictionary":
                    del encodings["image_id"]
                how = {**contract._LAYOUT, "use_dictionary": dictionaries, "column_encoding": encodings}
                path.write_bytes(parquet(table, {**how, "row_group_size": group}))
                found = [
                    timed(
                        lambda path=path: duckdb.sql(
                            f"select codes from '{path}' where image_id = '{wanted}'"
                        ).fetchall()
                    ),
                    timed(lambda path=path: pq.read_table(path, filters=[("image_id", "=", wanted)])),
                ]
                _, listing = timed(lambda path=path: pq.read_table(path, columns=["image_id", "variant"]))
                size = path.stat().st_size / len(table)
                cells = [f"{ids}, {group}", f"{size:.2f}", *(f"{1000 * taken:.1f}" for _, taken in found)]
                made.append([*cells, f"{len(table) / listing / 1e6:.0f}"])
    columns = ["image_id, rows a group", "bytes a row", "one image: DuckDB ms", "Arrow ms", "ids alone, M rows/s"]
    show("row groups (whole files)", columns, made)


def load() -> None:
    """Everything into one array, in a process of its own whose memory is watched."""
    random, made = np.random.default_rng(2), []
    with tempfile.TemporaryDirectory() as place:
        folder, names, data, write, read = Store(place), [], b"", 0.0, 0.0
        for shard in range(32):
            rows = rows_of(uniform(random, ROWS // 32))
            data, taken = timed(lambda rows=rows: to_parquet(INFO, rows), rounds=1)
            write += taken
            names.append(f"train-{shard:05d}-of-00032.parquet")
            folder.write(names[-1], data)
            read += timed(lambda data=data: from_parquet(data), rounds=1)[1]
        made += [["to_parquet", f"{write:.1f}", f"{ROWS / write / 1e6:.2f}", ""]]
        made += [["from_parquet (lists of ids)", f"{read:.1f}", f"{ROWS / read / 1e6:.2f}", ""]]
        for ids in ("codes", "ids"):
            command = [sys.executable, "-c", LOAD, place, ids, *names]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            count, size, peak, taken = json.loads(done.stdout)
            name = f"load_codes{', with ids' if ids == 'ids' else ''}: {size / 1e6:.0f} MB"
            made.append([name, f"{taken:.1f}", f"{count / taken / 1e6:.2f}", times(peak / size)])
    show(f"{ROWS:,} rows in 32 files", ["", "s", "M rows/s", "peak memory of what is returned"], made)


if __name__ == "__main__":
    main()
