"""Peak memory of encoding, decoding and a training step of SFTok-B, each measured in a process of its own."""

import ctypes
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from sftok.config import DecodingConfig
from sftok.model.prepared import InferencePrecision, prepare_decoder, prepare_encoder
from tests.benchmarks import machine, models
from tests.benchmarks.published import PublishedTokenizer
from tests.benchmarks.table import show

STEPS = DecodingConfig(num_steps=2)  # memory does not grow with the steps
MEBIBYTE = 1024  # kB, the unit of /proc
TRAIN_BATCH = 8
RUNS = {
    "encode": [(way, batch) for batch in (1, 8) for way in ("ours fp32", "ours bf16", "published fp32")],
    "decode": [(way, batch) for batch in (1, 4) for way in ("ours fp32", "ours bf16", "published fp32")],
    "train": [(way, TRAIN_BATCH) for way in ("bf16", "bf16, recomputing")],
}


def main() -> None:
    rows = []
    for work, runs in RUNS.items():
        for way, batch in runs:
            command = [sys.executable, "-m", "tests.benchmarks.bench_memory", work, way, str(batch)]
            base, peak = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
            rows.append([f"{work}: {way}", batch, base, peak - base, f"{(peak - base) / batch:.0f}"])
    columns = ["SFTok-B, 256 px", "batch", "models, MiB", "work adds at peak, MiB", "MiB an image"]
    show("peak memory (resident set; a training step is forward and backward, without the optimizer)", columns, rows)


def measure(work: str, way: str, batch: int) -> None:
    """Write the resident set before the work and its peak during the work, in MiB."""
    torch.set_num_threads(machine.THREADS)
    run = {"encode": encoding, "decode": decoding, "train": training}[work](way, batch)
    ctypes.CDLL(None).malloc_trim(0)  # what making the models left free would hide what the work takes
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    base = resident("VmRSS")
    run()
    sys.stdout.write(f"{base} {resident('VmHWM')}\n")


def resident(field: str) -> int:
    """A figure of this process's memory, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) // MEBIBYTE


def encoding(way: str, batch: int) -> Callable[[], object]:
    model, images = models.sftok_b(), models.pictures(batch, models.B_SIZE)
    if way == "published fp32":
        published = PublishedTokenizer(model)
        return lambda: published.encode(images)
    encoder = prepare_encoder(model, precision_of(way))
    return lambda: encoder(images)


def decoding(way: str, batch: int) -> Callable[[], object]:
    model, codes = models.sftok_b(), torch.randint(8192, (batch, 64))
    if way == "published fp32":
        published = PublishedTokenizer(model)
        return lambda: published.decode(codes, num_steps=STEPS.num_steps)
    decoder = prepare_decoder(model, None, precision_of(way))
    return lambda: decoder.render(*decoder.predict_proxy(codes, STEPS))


def training(way: str, batch: int) -> Callable[[], object]:
    model, images = models.sftok_b(), models.pictures(batch, models.B_SIZE)
    for part in (model.encoder, model.decoder):
        part.requires_grad_(True)
        part.transformer.recompute("recomputing" in way)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled="bf16" in way):
            quantized = model.encode(images)
            logits = model.decoder(model.decoder.all_masked(quantized.z_q), quantized.z_q)
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), torch.zeros(batch * 256).long())
        (loss + quantized.loss).backward()

    return step


def precision_of(way: str) -> InferencePrecision:
    return "bf16" if way.endswith("bf16") else "fp32"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    else:
        main()
