"""Codes to images by SFTok-B in eight steps with the pixel decoder, and each half of the work alone."""

import functools
from collections.abc import Callable

import torch

from sftok.config import DecodingConfig
from sftok.model.prepared import PreparedDecoder, prepare_decoder
from tests.benchmarks.bench_decode import spread_logits
from tests.benchmarks.device import models
from tests.benchmarks.device.bench import Bench, operations
from tests.benchmarks.published import PublishedTokenizer

BATCH, QUICK_BATCH = 64, 2
DECODING = DecodingConfig(num_steps=8)


def run(bench: Bench) -> None:
    """Every precision beside the published way in the same one."""
    model = models.tokenizer(bench)
    spread_logits(model.decoder.head[2])
    published = PublishedTokenizer(model).to(bench.device).eval()
    batch = QUICK_BATCH if bench.is_quick else BATCH
    codes = torch.randint(model.config.codebook_size, (batch, model.config.num_latent_tokens)).to(bench.device)
    plain = prepare_decoder(model, None)
    proxy_BP, logits_BPV = plain.predict_proxy(codes[:1], DECODING)
    z_q = model.quantizer.codebook()[codes[:1]]
    step = operations(lambda: model.decoder(proxy_BP, z_q))
    pixels = operations(lambda: model.soft_decode(logits_BPV))
    bench.put("arithmetic of a step and of the pixels", step / 1e9, "GFLOP", note=f"and {pixels / 1e9:.1f}")
    flops = DECODING.num_steps * step + pixels

    @torch.no_grad()
    def theirs(precision: str) -> None:
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=precision == "bf16"):
            published.decode(codes, num_steps=DECODING.num_steps)

    for precision in ("fp32", "bf16"):
        made = {"ours": plain if precision == "fp32" else prepare_decoder(model, None, precision)}
        if precision == "bf16":
            made["ours, compiled"] = prepare_decoder(model, None, precision, compile=True)
        ways = {"published": functools.partial(theirs, precision)}
        ways |= {name: whole(decoder, codes) for name, decoder in made.items()}
        measure = functools.partial(bench.race, items=batch, unit="images/s", precision=precision, rounds=3, warm=1)
        measure(f"{precision}, batch {batch}", ways, flops=flops)
        steps = {name: functools.partial(decoder.predict_proxy, codes, DECODING) for name, decoder in made.items()}
        measure(f"{precision}, steps alone", steps, flops=DECODING.num_steps * step)
        found = made["ours"].predict_proxy(codes, DECODING)
        last = {name: functools.partial(decoder.render, *found) for name, decoder in made.items()}
        measure(f"{precision}, pixels alone", last, flops=pixels)


def whole(decoder: PreparedDecoder, codes: torch.Tensor) -> Callable[[], object]:
    """Codes to images, without noise."""
    return lambda: decoder.render(*decoder.predict_proxy(codes, DECODING))
