"""Images on the device to codes by SFTok-B: batches and precisions, and which codes differ between them."""

import copy
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sftok.model.prepared import PRECISIONS, prepare_encoder
from sftok.model.tokenizer import SFTok
from tests.benchmarks import models as cpu_models
from tests.benchmarks.bench_encode import autocast_encode
from tests.benchmarks.device import models
from tests.benchmarks.device.bench import Bench, lazily, operations, share_equal
from tests.benchmarks.published import PublishedTokenizer

BATCHES, QUICK_BATCHES = (8, 64, 128, 256), (2, 4)
SINKHORN_BATCHES = (8, 128)  # where the published assignment is measured, too
COMPILED = 256
CPU_IMAGES = 8


def run(bench: Bench) -> None:
    """Speed, then agreement."""
    model = models.tokenizer(bench)
    images = models.images(bench, (QUICK_BATCHES if bench.is_quick else BATCHES)[-1])
    flops = operations(lambda: model.encoder(images[:1]))
    bench.put("arithmetic of an image", flops / 1e9, "GFLOP")
    published = PublishedTokenizer(model).to(bench.device).eval()
    for batch in QUICK_BATCHES if bench.is_quick else BATCHES:
        speed(bench, model, published, images[:batch], flops)
    agreement(bench, model, images)


def speed(bench: Bench, model: SFTok, published: PublishedTokenizer, images: Tensor, flops: float) -> None:
    """A batch by each way."""
    for precision in ("fp32", "bf16"):
        ways: dict[str, Callable[[], object]] = {}
        if precision == "bf16":
            ways["published, nearest codes"] = lambda: autocast_encode(published, images)
            ways["bare loop"] = lambda: bare_encode(model, images)
        elif len(images) in SINKHORN_BATCHES or bench.is_quick:
            ways["published, Sinkhorn"] = lambda: published.encode(images)
        encoder = prepare_encoder(model, precision)
        ways["ours"] = lambda encoder=encoder: encoder(images)
        if precision == "bf16" and (bench.is_quick or len(images) == COMPILED):
            compiled = lazily(lambda: prepare_encoder(model, "bf16", compile=True))
            ways["ours, compiled"] = functools.partial(compiled, images)
        title = f"{precision}, batch {len(images)}"
        bench.race(title, ways, items=len(images), unit="images/s", flops=flops, precision=precision)


@torch.inference_mode()
def bare_encode(model: SFTok, images: Tensor) -> Tensor:
    """The modules under autocast and an argmax."""
    with torch.autocast(images.device.type, torch.bfloat16):
        z_MD = F.normalize(model.encoder(images).float(), dim=-1).flatten(0, 1)
    return (z_MD @ model.quantizer.codebook().float().T).argmax(-1)


def agreement(bench: Bench, model: SFTok, images: Tensor) -> None:
    """Share of equal codes, with a codebook as close together as the encoder's outputs are."""
    cpu_models.draw_codebook(model, prepare_encoder(model, "bf16"), 4 if bench.is_quick else 64)
    few = min(8, len(images) // 2)
    wanted = prepare_encoder(model, "fp32")(images)
    for precision in PRECISIONS:
        encoder = prepare_encoder(model, precision)
        whole = encoder(images)
        parts = torch.cat([encoder(part) for part in images.split(few)])
        pairs = {
            f"{precision}: codes as in fp32": (whole, wanted),
            f"{precision}: codes at batch {few} as at {len(images)}": (parts, whole),
        }
        for name, (found, expected) in pairs.items():
            bench.put(name, 100 * share_equal(found, expected), "%")
    on_cpu = prepare_encoder(copy.deepcopy(model).cpu(), "fp32")(images[:CPU_IMAGES].cpu())
    share = share_equal(on_cpu, wanted[:CPU_IMAGES])
    bench.put(f"fp32: codes on the CPU as on {bench.device.type}", 100 * share, "%")
    name, compiled = "bf16, compiled: codes as in fp32", lazily(lambda: prepare_encoder(model, "bf16", compile=True))
    bench.attempt(name, lambda: bench.put(name, 100 * share_equal(compiled(images), wanted), "%"))
