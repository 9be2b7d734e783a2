"""Scores of reconstructions: images that the tokenizer encoded and decoded again."""

import itertools
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, NamedTuple

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from sftok.evaluation.meters import FD_RANDOM, CodeBatches, FeatureMeter, Meters, code_batches
from sftok.evaluation.results import Histogram, Score
from sftok.metrics import functional
from sftok.metrics.class_reader import thumbnail_rows
from sftok.metrics.image_meter import ImageMeter, pair_metrics
from sftok.metrics.random_features import RandomFeatures


class Figure(NamedTuple):
    """A figure of reconstructions: its names, its convention, and what its protocol says beyond the others'."""

    name: str
    label: str
    better: Literal["higher", "lower"]
    definition: str
    unit: Literal["", "dB", "%"] = ""
    facts: Mapping[str, Any] = {}


_PSNR = f"mean over images of 10 log10(255^2 / MSE over RGB), identical images {functional.PSNR_CEILING:.0f} dB"
_SSIM = "Gaussian 11x11, sigma 1.5, no padding, mean over positions and RGB, then over images"
_LPIPS = "VGG16, linear layers v0.1, RGB in [0, 1] times 2 minus 1, mean over images"
_OF_CODES = {"reference": "the teacher's codes of the held-out images", "rounding": "", "dtype": ""}
_FIGURES = (
    Figure("psnr", "PSNR", "higher", _PSNR, "dB"),
    Figure("ssim", "SSIM", "higher", _SSIM),
    Figure("l1", "L1", "lower", "mean absolute error over RGB in [0, 1], then over images"),
    Figure("l2", "L2", "lower", "mean squared error over RGB in [0, 1], then over images"),
    Figure("lpips", "LPIPS", "lower", _LPIPS, facts={"extractor": "LPIPS (VGG16)"}),
    Figure(
        "code_agreement",
        "Code agreement with the teacher",
        "higher",
        "share of positions with the teacher's code",
        "%",
        _OF_CODES,
    ),
    Figure("fd_random", RandomFeatures.label, "lower", FD_RANDOM),
)
FIGURES = {figure.name: figure for figure in _FIGURES}
_BARS = 64  # of the histogram of code frequencies
_CODEBOOK_SCORES: tuple[tuple[str, str, Literal["%", "bits", "codes"], Callable[[Tensor], float]], ...] = (
    ("usage", "Codebook usage", "%", functional.codebook_usage),
    ("entropy", "Code entropy", "bits", functional.entropy_bits),
    ("perplexity", "Code perplexity", "codes", functional.perplexity),
)


def figures_of(images: Tensor, originals: Tensor, codes: Tensor, teacher_codes: Tensor) -> dict[str, Tensor]:
    """Compute the figures of reconstructed uint8 images (n, 3, S, S) and of their proxy codes (n, P), (n) each."""
    agreement = functional.code_agreement(codes, teacher_codes.to(codes.device))
    return pair_metrics(images, originals) | {"code_agreement": agreement}


class StepOutcome(NamedTuple):
    """Scores of the reconstructions in one number of decoding steps, and what is shown of them."""

    scores: tuple[Score, ...]
    psnr: Tensor
    """of each image, (n) float64."""
    shown: dict[int, Tensor]
    """images that were to be kept, by index."""


def measure_step(meters: Meters, num_steps: int, shown: Collection[int]) -> StepOutcome:
    """Score the held-out images' reconstructions in one number of steps; they stream past, and those `shown` are kept.

    Raises:
        ValueError: there are more or fewer reconstructions than images, or of another shape.
    """
    inputs, meter = meters.inputs, ImageMeter()
    kept: dict[int, Tensor] = {}
    indices, expected = set(shown), inputs.val_images.shape
    scored = inputs.scorer.meter(num_steps) if inputs.scorer else None
    for made in inputs.reconstruct(num_steps):
        at, images = meter.count, functional.to_uint8(made.images)
        originals = inputs.val_images[at : at + len(images)].to(images.device)
        if images.shape != originals.shape:
            raise ValueError(f"reconstructions have shape {tuple(images.shape)}, held-out images {tuple(expected)}")
        figures = figures_of(images, originals, made.proxy_codes, made.teacher_codes)
        figures["features"] = meters.features(images)
        if meters.reader is not None:
            figures["thumbnails"] = thumbnail_rows(images)
        if inputs.lpips is not None:
            figures["lpips"] = inputs.lpips(images, originals)
        if scored is not None:
            scored.add(images)
        for index in indices.intersection(range(at, at + len(images))):
            kept[index] = images[index - at].to("cpu", copy=True)  # and not the whole batch
        meter.add(**figures)
    if meter.count != len(inputs.val_images):
        raise ValueError(f"reconstructions have shape ({meter.count}, ...), held-out images {tuple(expected)}")
    return StepOutcome(_scores(meters, num_steps, meter, scored), meter["psnr"], kept)


def _scores(meters: Meters, num_steps: int, figures: ImageMeter, scored: FeatureMeter | None) -> tuple[Score, ...]:
    inputs, n = meters.inputs, figures.count
    steps: dict[str, Any] = {"num_steps": num_steps, "temperature": inputs.facts.temperature}
    pairs = {"reference": "the held-out images themselves", "num_reference": n, **steps}
    predicted = meters.reader.read_thumbnails(figures["thumbnails"].numpy()) if meters.reader else None
    scores = [
        Score(
            name=f"reconstruction.{name}@{num_steps}",
            label=figure.label,
            unit=figure.unit,
            better=figure.better,
            value=figures[name].double().mean().item(),
            protocol=meters.protocol(n, definition=figure.definition, **{**pairs, **figure.facts}),
        )
        for name, figure in FIGURES.items()
        if name in figures
    ]
    scores.append(
        Score(
            name=f"reconstruction.fd_random@{num_steps}",
            label=FIGURES["fd_random"].label,
            better="lower",
            value=meters.frechet(figures["features"], meters.val_moments),
            protocol=meters.feature_protocol(n, "real held-out images", n, **steps),
        )
    )
    label = "Class agreement, reconstructions"
    name = f"reconstruction.class_agreement@{num_steps}"
    if (agreement := meters.class_agreement(name, label, predicted, inputs.val_labels, **steps)) is not None:
        scores.append(agreement)
    if inputs.scorer is not None and scored is not None:
        facts = {"temperature": inputs.facts.temperature, "seeds": meters.seeds}
        scores += inputs.scorer.reconstruction(scored, inputs.val_images, num_steps, facts)
    return tuple(scores)


def measure_codebook(meters: Meters) -> tuple[tuple[Score, ...], Histogram]:
    """Score codebook use, and draw how often each code occurs, most frequent first."""
    size = meters.inputs.facts.codebook_size
    scores, series = [], {}
    for split, given in (("held-out", meters.inputs.val_codes), ("training", meters.inputs.train_codes)):
        counts, count, length = _counted(given, size)
        series[f"{split} images"] = counts
        protocol = meters.protocol(
            count,
            rounding="",
            dtype="",
            reference=f"codebook of {size:,}",
            definition=f"codes of {split} images and their variants, {length} an image",
        )
        scores += [
            Score(
                name=f"codebook.{name}_{split.replace('-', '_')}",
                label=f"{label}, {split}",
                unit=unit,
                better="higher",
                value=score(counts),
                protocol=protocol,
            )
            for name, label, unit, score in _CODEBOOK_SCORES
        ]
    return tuple(scores), _usage(series, size)


def _usage(series: dict[str, Tensor], size: int) -> Histogram:
    """Return the shares of codes by rank, in at most `_BARS` groups of neighbouring ranks."""
    edges = torch.linspace(0, size, min(size, _BARS) + 1).round().long()
    shares = {}
    for name, counts in series.items():
        falling = counts.double().sort(descending=True).values / counts.sum()
        heights = [falling[a:b].mean().item() for a, b in itertools.pairwise(edges.tolist())]
        shares[name] = tuple(heights)
    return Histogram(
        title="Code frequencies, most frequent first",
        axis=f"rank of the code, out of {size:,}",
        edges=tuple(edges.double().tolist()),
        series=shares,
    )


def _counted(codes: ArrayLike | CodeBatches, codebook_size: int) -> tuple[Tensor, int, int]:
    """Count the occurrences of each code, (K) int64, the rows, and the codes per row."""
    counts, rows, length = torch.zeros(codebook_size, dtype=torch.int64), 0, 0
    for batch in code_batches(codes):
        counts += functional.code_counts(batch, codebook_size)
        rows, length = rows + len(batch), batch.shape[1]
    return counts, rows, length
