"""Scores of reconstructions: images that the tokenizer encoded and decoded again."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from flows.evaluation.gallery import extreme_gallery, extremes_shown, reconstruction_gallery, reconstructions_shown
from flows.evaluation.meters import CodeBatches, FeatureMeter, Meters, ReconstructionBatch, code_batches
from flows.results.types import Gallery, Histogram, ReconstructionReport, Score, StepScores
from sftok.metrics import functional
from sftok.metrics.class_reader import thumbnail_rows
from sftok.metrics.image_meter import ImageMeter, pair_metrics

_BARS = 64  # of the histogram of code frequencies
_CODEBOOK_SCORES: tuple[tuple[str, str, Literal["%", "bits", "codes"], Callable[[Tensor], float]], ...] = (
    ("usage", "Codebook usage", "%", functional.codebook_usage),
    ("entropy", "Code entropy", "bits", functional.entropy_bits),
    ("perplexity", "Code perplexity", "codes", functional.perplexity),
)


def measure_reconstruction(
    meters: Meters, steps: Sequence[int], *, step_done: Callable[[int], None]
) -> ReconstructionReport:
    """Reconstruct the held-out images with each number of decoding steps and score them; then count the codes.

    Reconstructions are streamed in batches and decoded once, except the few that turn out to be extremes.
    """
    inputs, by_steps, shown, extremes = meters.inputs, [], {}, None
    for done, num_steps in enumerate(steps):
        summary = _summarize(meters, num_steps)
        shown[num_steps] = summary.shown
        by_steps.append(StepScores(num_steps=num_steps, measures=_step_scores(meters, num_steps, summary)))
        if done == len(steps) - 1:
            extremes = _extremes(meters, num_steps, summary.figures["psnr"])
        step_done(done + 1)
    gallery = reconstruction_gallery(
        meters.pictures, inputs.val_images, shown, class_ids=inputs.val_labels, class_names=inputs.class_names
    )
    scores, usage = _codebook(meters)
    return ReconstructionReport(
        by_steps=tuple(by_steps),
        measures=scores,
        gallery=gallery,
        extremes=extremes,
        agreement=inputs.agreement() if inputs.agreement else None,
        usage=usage,
    )


class _Summary(NamedTuple):
    """Values kept of the streamed reconstructions in one number of steps."""

    figures: ImageMeter
    shown: dict[int, Tensor]
    """images of the gallery, by index."""
    scored: FeatureMeter | None


def _summarize(meters: Meters, num_steps: int) -> _Summary:
    inputs, meter = meters.inputs, ImageMeter()
    shown: dict[int, Tensor] = {}
    indices, expected = set(reconstructions_shown(inputs.val_labels)), inputs.val_images.shape
    scored = inputs.scorer.meter(num_steps) if inputs.scorer else None
    for made in itertools.starmap(ReconstructionBatch, inputs.reconstruct(num_steps)):
        at, images = meter.count, functional.to_uint8(made.images)
        originals = inputs.val_images[at : at + len(images)].to(images.device)
        if images.shape != originals.shape:
            raise ValueError(f"reconstructions have shape {tuple(images.shape)}, held-out images {tuple(expected)}")
        teacher_codes = made.teacher_codes.to(made.proxy_codes.device)
        figures = pair_metrics(images, originals)
        figures["code_agreement"] = functional.code_agreement(made.proxy_codes, teacher_codes)
        figures["features"] = meters.features(images)
        if meters.reader is not None:
            figures["thumbnails"] = thumbnail_rows(images)
        if inputs.lpips is not None:
            figures["lpips"] = inputs.lpips(images, originals)
        if scored is not None:
            scored.add(images)
        for index in indices.intersection(range(at, at + len(images))):
            shown[index] = images[index - at].to("cpu", copy=True)  # and not the whole batch
        meter.add(**figures)
    if meter.count != len(inputs.val_images):
        raise ValueError(f"reconstructions have shape ({meter.count}, ...), held-out images {tuple(expected)}")
    return _Summary(meter, shown, scored)


def _extremes(meters: Meters, num_steps: int, psnr: Tensor) -> Gallery:
    """Show the best and worst reconstructions, decoded again: which ones is known only at the end."""
    inputs, chosen = meters.inputs, sorted({i for row in extremes_shown(psnr).values() for i in row})
    parts = [
        functional.to_uint8(ReconstructionBatch(*made).images).cpu() for made in inputs.reconstruct(num_steps, chosen)
    ]
    return extreme_gallery(
        meters.pictures,
        inputs.val_images,
        dict(zip(chosen, torch.cat(parts), strict=True)),
        psnr,
        class_ids=inputs.val_labels,
        class_names=inputs.class_names,
    )


def _step_scores(meters: Meters, num_steps: int, summary: _Summary) -> tuple[Score, ...]:
    figures, n = summary.figures, summary.figures.count
    steps: dict[str, Any] = {"num_steps": num_steps, "temperature": meters.inputs.facts.temperature}
    pairs = {"reference": "the held-out images themselves", "num_reference": n, **steps}
    psnr_text = f"mean over images of 10 log10(255^2 / MSE over RGB), identical images {functional.PSNR_CEILING:.0f} dB"
    ssim_text = "Gaussian 11x11, sigma 1.5, no padding, mean over positions and RGB, then over images"
    predicted = meters.reader.read_thumbnails(figures["thumbnails"].numpy()) if meters.reader else None
    scores = [
        Score(
            name=f"reconstruction.psnr@{num_steps}",
            label="PSNR",
            unit="dB",
            better="higher",
            value=figures["psnr"].mean().item(),
            protocol=meters.protocol(n, definition=psnr_text, **pairs),
        ),
        Score(
            name=f"reconstruction.ssim@{num_steps}",
            label="SSIM",
            better="higher",
            value=figures["ssim"].mean().item(),
            protocol=meters.protocol(n, definition=ssim_text, **pairs),
        ),
        Score(
            name=f"reconstruction.l1@{num_steps}",
            label="L1",
            better="lower",
            value=figures["l1"].mean().item(),
            protocol=meters.protocol(n, definition="mean absolute error over RGB in [0, 1], then over images", **pairs),
        ),
        Score(
            name=f"reconstruction.l2@{num_steps}",
            label="L2",
            better="lower",
            value=figures["l2"].mean().item(),
            protocol=meters.protocol(n, definition="mean squared error over RGB in [0, 1], then over images", **pairs),
        ),
        _lpips(meters, num_steps, figures, pairs),
        Score(
            name=f"reconstruction.code_agreement@{num_steps}",
            label="Code agreement with the teacher",
            unit="%",
            better="higher",
            value=figures["code_agreement"].mean().item(),
            protocol=meters.protocol(
                n,
                reference="the teacher's codes of the held-out images",
                num_reference=n,
                rounding="",
                dtype="",
                definition="share of positions with the teacher's code",
                **steps,
            ),
        ),
        Score(
            name=f"reconstruction.fd_random@{num_steps}",
            label=meters.features.label,
            better="lower",
            value=meters.frechet(figures["features"], meters.val_moments),
            protocol=meters.feature_protocol(n, "real held-out images", n, **steps),
        ),
        meters.class_agreement(
            f"reconstruction.class_agreement@{num_steps}",
            "Class agreement, reconstructions",
            predicted,
            meters.inputs.val_labels,
            **steps,
        ),
    ]
    found = tuple(score for score in scores if score is not None)
    scorer = meters.inputs.scorer
    if scorer is None or summary.scored is None:
        return found
    return (*found, *scorer.reconstruction(summary.scored, meters.inputs.val_images, num_steps, _decoding(meters)))


def _lpips(meters: Meters, num_steps: int, figures: ImageMeter, pairs: dict[str, Any]) -> Score | None:
    if "lpips" not in figures:
        return None
    definition = "VGG16, linear layers v0.1, RGB in [0, 1] times 2 minus 1, mean over images"
    return Score(
        name=f"reconstruction.lpips@{num_steps}",
        label="LPIPS",
        better="lower",
        value=figures["lpips"].double().mean().item(),
        protocol=meters.protocol(figures.count, extractor="LPIPS (VGG16)", definition=definition, **pairs),
    )


def _decoding(meters: Meters) -> dict[str, object]:
    return {"temperature": meters.inputs.facts.temperature, "seeds": meters.seeds}


def _codebook(meters: Meters) -> tuple[tuple[Score, ...], Histogram]:
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
