"""Encoding with SFTok-B at 256 x 256: images/s beside the published code, and how near the machine's peak it comes."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sftok.model.prepared import PRECISIONS, prepare_encoder
from sftok.model.tokenizer import SFTok
from tests.benchmarks import machine, models
from tests.benchmarks.published import PublishedTokenizer
from tests.benchmarks.table import percent, seconds, show, times

REFERENCE = "published fp32, Sinkhorn"
ROUNDS = {1: 9, 8: 5, 32: 3}


def main() -> None:
    torch.set_num_threads(machine.THREADS)
    model = models.sftok_b()
    published = PublishedTokenizer(model)
    rows, best = [], {}
    for batch in ROUNDS:
        ways = ways_to_encode(model, published, models.pictures(batch, models.B_SIZE))
        taken = seconds({**ways, **machine.products()}, rounds=ROUNDS[batch])
        for name in ways:
            peak = machine.peak("bf16" if name.endswith("bf16") else "fp32", taken)
            speed = models.B_ENCODE_GFLOP * batch / taken[name]
            rows.append(
                [
                    f"batch {batch}: {name}",
                    f"{batch / taken[name]:.2f}",
                    times(taken[REFERENCE] / taken[name]) if REFERENCE in taken else "",
                    f"{speed:.0f}",
                    percent(speed / peak.best),
                    percent(speed / peak.plain),
                ]
            )
        best = {precision: machine.peak(precision, taken) for precision in PRECISIONS}
    columns = ["SFTok-B, 256 px", "img/s", "of published fp32", "GFLOP/s", "of best GEMM", "of torch.mm"]
    show("encode (GFLOP of the full forward, 58.6 an image; ours leaves out what is not kept)", columns, rows)
    figures = [[name, *(f"{figure:.0f}" for figure in peak)] for name, peak in best.items()]
    show("GEMM in the same run, GFLOP/s", ["", "torch.mm", "packed linear"], figures)
    compare_codes(model, published)


def ways_to_encode(model: SFTok, published: PublishedTokenizer, images: Tensor) -> dict[str, Callable[[], object]]:
    """Ours, and at the batches where it does not take minutes the published one."""
    ways: dict[str, Callable[[], object]] = {}
    for precision in PRECISIONS:
        encoder = prepare_encoder(model, precision)
        ways[f"ours {precision}"] = lambda encoder=encoder: encoder(images)
    if len(images) <= 8:
        ways[REFERENCE] = lambda: published.encode(images)
        ways["published bf16"] = lambda: autocast_encode(published, images)
    return ways


def autocast_encode(published: PublishedTokenizer, images: Tensor) -> Tensor:
    with torch.autocast(images.device.type, torch.bfloat16):
        return published.encode(images, nearest=True)


def compare_codes(model: SFTok, published: PublishedTokenizer) -> None:
    """Whose codes differ, with an initial codebook and with one drawn from the encoder's outputs."""
    images, rows = models.pictures(16, models.B_SIZE), []
    for codebook in ("initial", "drawn"):
        if codebook == "drawn":
            models.draw_codebook(model, prepare_encoder(model, "bf16"), 8)
        with torch.no_grad():
            z = torch.cat([published.latents(part) for part in images.split(8)])
            wanted = published.quantize(z, nearest=True)[1]
            balanced = published.quantize(z)[1]
            exact, rounded = (
                torch.cat([prepare_encoder(model, precision)(part) for part in images.split(8)])
                for precision in PRECISIONS
            )
            theirs = torch.cat([autocast_encode(published, part) for part in images.split(8)])
        rows += [
            [f"{codebook}: ours fp32", percent((exact == wanted).float().mean()), f"{worst_tie(model, z, exact):.1e}"],
            [f"{codebook}: ours bf16", percent((rounded == wanted).float().mean()), ""],
            [f"{codebook}: published bf16", percent((theirs == wanted).float().mean()), ""],
            [f"{codebook}: published Sinkhorn", percent((balanced == wanted).float().mean()), ""],
        ]
    columns = ["codebook: codes of", "equal to published fp32 nearest", "widest gap where not"]
    show("codes (random weights; gap = how much farther the code taken is than the nearest)", columns, rows)


def worst_tie(model: SFTok, z_BND: Tensor, codes_BN: Tensor) -> float:
    """How much farther the code taken is than the nearest, at most."""
    z_MD, codebook = F.normalize(z_BND.double(), dim=-1).flatten(0, 1), model.quantizer.codebook().double()
    distance_MK = torch.cdist(z_MD, codebook)
    return float((distance_MK.gather(1, codes_BN.view(-1, 1))[:, 0] - distance_MK.amin(1)).max())


if __name__ == "__main__":
    main()
