"""Parquet shards of JPEGs to Parquet shards of codes by one worker, beside what the card and the data path do alone."""

import functools
import importlib
import io
import tempfile
from dataclasses import dataclass, field
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from infra.artifacts.shards import FileEntry, shard_name, write_shard
from infra.codes.contract import CodesInfo
from infra.store.store import Store
from sftok.coding.encode import EncodeJob, ShardEncoder
from sftok.config import AugmentConfig
from sftok.images.chunks import decoded_shards
from sftok.images.contract import METADATA_KEY
from sftok.images.decode_ahead import DECODERS, Decoders, spare_processes
from sftok.model.prepared import prepare_encoder
from sftok.model.tokenizer import SFTok
from sftok.weights.artifacts import save_tokenizer
from tests.benchmarks.device import models
from tests.benchmarks.device.bench import Bench, operations
from tests.benchmarks.jpegs import DISTINCT, SIZE, jpeg

SHARDS, ROWS, MICRO_BATCH = 4, 2048, 256
QUICK_SHARDS, QUICK_ROWS, QUICK_MICRO_BATCH = 2, 8, 4


def run(bench: Bench) -> None:
    """The data path and the whole, with images decoded in threads, in processes, and where the encoder computes."""
    shards, rows = (QUICK_SHARDS, QUICK_ROWS) if bench.is_quick else (SHARDS, ROWS)
    micro_batch = QUICK_MICRO_BATCH if bench.is_quick else MICRO_BATCH
    model = models.tokenizer(bench)
    with tempfile.TemporaryDirectory() as folder:
        work = Work(bench, Store(folder), model, *write_images(Store(folder).at("images"), shards, rows), micro_batch)
        save_tokenizer(model, work.folder.at("tokenizer"))
        bench.attempt("from the device's memory", work.card)
        for processes in dict.fromkeys((0, 2 if bench.is_quick else spare_processes())):
            bench.attempt(f"decoding, {ways(processes)}", functools.partial(work.data, processes))
            bench.attempt(f"shards to shards, {ways(processes)}", functools.partial(work.whole, "pil", processes))
        bench.attempt("shards to shards, torchcodec", functools.partial(work.whole, "torchcodec", 0))


def ways(processes: int) -> str:
    """How images are decoded."""
    return f"{processes} processes" if processes else f"{DECODERS} threads"


def write_images(folder: Store, shards: int, rows: int) -> tuple[list[FileEntry], float]:
    """Image Parquet as prepare writes it, of JPEGs of some 100 kB, and their mean size in kB."""
    jpegs = [jpeg(number) for number in range(DISTINCT)]
    files = []
    for shard in range(shards):
        ids = [f"{shard:05d}/{row:05d}" for row in range(rows)]
        data = [jpegs[(shard * rows + row) % DISTINCT] for row in range(rows)]
        image = pa.array([{"bytes": bytes_, "path": id_} for id_, bytes_ in zip(ids, data, strict=True)])
        table = pa.table({"image_id": ids, "image": image, "label": pa.nulls(rows, pa.int64())})
        told = {METADATA_KEY: b'{"class_names": null, "split": "train"}'}
        sink = io.BytesIO()
        # Each image is written, though they are few: a dictionary would keep one of each.
        pq.write_table(
            table.replace_schema_metadata(told), sink, compression="none", use_dictionary=False, row_group_size=256
        )
        files.append(write_shard(folder, shard_name("train", shard, shards), sink.getvalue(), rows))
    return files, sum(map(len, jpegs)) / DISTINCT / 1000


@dataclass
class Work:
    """The shards, and what parts of the work were found to reach, in images a second."""

    bench: Bench
    folder: Store
    model: SFTok
    images: list[FileEntry]
    kilobytes: float
    """of an image."""
    micro_batch: int
    speeds: dict[str, float] = field(default_factory=dict)

    def card(self) -> None:
        """The encoder alone."""
        encoder = prepare_encoder(self.model, "bf16", compile=self.is_compiled)
        images = models.images(self.bench, self.micro_batch)
        flops = operations(lambda: self.model.encoder(images[:1]))
        measure = functools.partial(self.bench.race, items=self.micro_batch, unit="images/s", flops=flops)
        self.speeds["card"] = measure("bf16, from the device's memory", {"ours": lambda: encoder(images)})["ours"]

    def data(self, processes: int) -> None:
        """Reading, decoding, resizing and cropping, with nothing behind them."""
        decoders = Decoders(processes, is_pinned=self.bench.device.type == "cuda")
        shards = [(image.path, (self.model.image_size,)) for image in self.images]

        def read(some: list[tuple[str, tuple[int, ...]]]) -> None:
            for _ in decoded_shards(self.folder.at("images"), some, self.micro_batch, decoders):
                pass

        read(shards[:1])  # processes start
        self.speeds["data"] = self.rows / self.bench.once(lambda: read(shards[1:]))
        decoders.close()
        size, note = f"{SIZE[0]} x {SIZE[1]}", f"({self.kilobytes:.0f} kB an image)"
        self.bench.put(f"JPEG of {size}, {ways(processes)}", self.speeds["data"], "images/s", note=note)

    def whole(self, decoder: Literal["pil", "torchcodec"], processes: int) -> None:
        """A worker; the first shard warms it up, the others are timed."""
        if decoder == "torchcodec":
            importlib.import_module(decoder)  # where it is not installed, that is what is told
        config = self.model.config
        info = CodesInfo(
            tokenizer="0" * 32,
            codebook_size=config.codebook_size,
            num_tokens=config.num_latent_tokens,
            image_size=self.model.image_size,
            assignment="nearest",
            precision="bf16",
            class_names=None,
        )
        job = EncodeJob(
            self.folder.at("images"),
            self.folder.at("tokenizer"),
            self.folder.at(f"codes-{decoder}-{processes}"),
            info,
            {"train": ("center",)},
            AugmentConfig(),
            self.micro_batch,
            device=self.bench.device.type,
            compile=self.is_compiled,
            decoder=decoder,
            decoders=processes,
        )
        worker = ShardEncoder(job)
        worker(self.images[0])
        taken = self.bench.once(lambda: worker.several(self.images[1:]))
        beside = self.speeds if decoder == "pil" else {"card": self.speeds["card"]}
        how = ways(processes) if decoder == "pil" else decoder
        self.bench.put(f"shards to shards, {how}", self.rows / taken, "images/s", beside=beside)

    @property
    def is_compiled(self) -> bool:
        """As encoding does it by default."""
        return self.bench.device.type == "cuda"

    @property
    def rows(self) -> int:
        """Images of the shards that are timed."""
        return sum(image.rows or 0 for image in self.images[1:])
