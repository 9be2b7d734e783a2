"""Decoding with SFTok-B at 256 x 256, eight steps and the pixel decoder: images/s beside the published code."""

import torch

from sftok.config import DecodingConfig
from sftok.model.prepared import PreparedDecoder, prepare_decoder
from tests.benchmarks import machine, models
from tests.benchmarks.published import PublishedTokenizer
from tests.benchmarks.table import percent, seconds, show, times

BATCHES = (1, 4)
DECODING = DecodingConfig(num_steps=8)


def main() -> None:
    torch.set_num_threads(machine.THREADS)
    model = models.sftok_b()
    spread_logits(model.decoder.head[2])
    published = PublishedTokenizer(model)
    decoders = {"ours fp32": prepare_decoder(model, None), "ours bf16": prepare_decoder(model, None, "bf16")}
    codes = torch.randint(8192, (max(BATCHES), 64), generator=torch.Generator().manual_seed(0))
    published.decode(codes[:1], num_steps=1)
    rows = []
    for batch in BATCHES:
        part = codes[:batch]
        ours = {name: lambda decoder=decoder, x=part: render(decoder, x) for name, decoder in decoders.items()}
        theirs = {
            "published, one pass a step": lambda x=part: published.decode(x),
            "published, guidance 3.0 (its default)": lambda x=part: published.decode(x, guidance=3.0),
        }
        taken = seconds(ours, rounds=3) | seconds(theirs, rounds=1, warm=False)
        one, two = (taken[name] for name in theirs)
        rows += [
            [f"batch {batch}: {name}", f"{batch / t:.3f}", times(one / t), times(two / t)] for name, t in taken.items()
        ]
    columns = ["SFTok-B, 256 px, 8 steps", "img/s", "of one pass", "of its default"]
    show("decode, with the pixel decoder", columns, rows)
    compare_images(published, decoders, codes)


def spread_logits(layer: torch.nn.Module) -> None:
    """Give logits the spread that training gives them: those of initial weights are all but equal."""
    assert isinstance(layer, torch.nn.Linear)
    layer.weight.mul_(20)


def render(decoder: PreparedDecoder, codes: torch.Tensor) -> torch.Tensor:
    return decoder.render(*decoder.predict_proxy(codes, DECODING))


def compare_images(published: PublishedTokenizer, decoders: dict[str, PreparedDecoder], codes: torch.Tensor) -> None:
    """Ids, and images of the same logits, beside the published way."""
    codes, rows = codes[:2], []
    ids, images = published.decode(codes)
    for name, decoder in decoders.items():
        found, logits = decoder.predict_proxy(codes, DECODING)
        error = (decoder.render(found, logits) - images).abs()
        with torch.no_grad():
            same_logits = (decoder.render(found, logits) - published.model.soft_decode(logits).clamp(0, 1)).abs()
        agreement = percent((found == ids).float().mean())
        rows.append([name, agreement, f"{error.max():.1e}", f"{error.mean():.1e}", f"{same_logits.max():.1e}"])
    columns = ["against published fp32", "equal ids", "largest error", "mean error", "of pixel decoder alone"]
    show("images in [0, 1] (random weights)", columns, rows)


if __name__ == "__main__":
    main()
