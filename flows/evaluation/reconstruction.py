"""How faithful images are that went through the tokenizer and back."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from flows.evaluation.gallery import extreme_gallery, extremes_shown, reconstruction_gallery, reconstructions_shown
from flows.evaluation.meters import CodeBatches, FeatureMeter, Instruments, Reconstructed, code_batches
from flows.results.types import Gallery, Histogram, Measure, ReconstructionReport, StepMeasures
from sftok.metrics import functional
from sftok.metrics.class_reader import thumbnail_rows
from sftok.metrics.image_meter import ImageMeter, pair_figures

_BARS = 64  # of the drawing of the codes' use


def measure_reconstruction(
    tools: Instruments, steps: Sequence[int], *, step_done: Callable[[int], None]
) -> ReconstructionReport:
    """Reconstruct the held-out images at each number of decoding steps and compare; then count the codes.

    Reconstructions pass some at a time, and are decoded once but for the few that turn out to be extremes.
    """
    inputs, by_steps, shown, extremes = tools.inputs, [], {}, None
    for done, num_steps in enumerate(steps):
        seen = _seen(tools, num_steps)
        shown[num_steps] = seen.shown
        by_steps.append(StepMeasures(num_steps=num_steps, measures=_step_measures(tools, num_steps, seen)))
        if done == len(steps) - 1:
            extremes = _extremes(tools, num_steps, seen.figures["psnr"])
        step_done(done + 1)
    gallery = reconstruction_gallery(
        tools.pictures, inputs.val_images, shown, class_ids=inputs.val_labels, class_names=inputs.class_names
    )
    measures, usage = _codebook(tools)
    return ReconstructionReport(
        by_steps=tuple(by_steps),
        measures=measures,
        gallery=gallery,
        extremes=extremes,
        agreement=inputs.agreement() if inputs.agreement else None,
        usage=usage,
    )


class _Seen(NamedTuple):
    """What is left of the reconstructions in one number of steps when they have passed."""

    figures: ImageMeter
    shown: dict[int, Tensor]
    """images of the gallery, by index."""
    scored: FeatureMeter | None


def _seen(tools: Instruments, num_steps: int) -> _Seen:
    inputs, meter = tools.inputs, ImageMeter()
    shown: dict[int, Tensor] = {}
    indices, expected = set(reconstructions_shown(inputs.val_labels)), inputs.val_images.shape
    scored = inputs.scorer.meter(num_steps) if inputs.scorer else None
    for made in itertools.starmap(Reconstructed, inputs.reconstruct(num_steps)):
        at, images = meter.count, functional.to_uint8(made.images)
        originals = inputs.val_images[at : at + len(images)].to(images.device)
        if images.shape != originals.shape:
            raise ValueError(f"reconstructions have shape {tuple(images.shape)}, held-out images {tuple(expected)}")
        teacher_codes = made.teacher_codes.to(made.proxy_codes.device)
        figures = pair_figures(images, originals)
        figures["code_agreement"] = functional.code_agreement(made.proxy_codes, teacher_codes)
        figures["features"] = tools.features(images)
        if tools.reader is not None:
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
    return _Seen(meter, shown, scored)


def _extremes(tools: Instruments, num_steps: int, psnr: Tensor) -> Gallery:
    """The gallery of the best and worst reconstructions, which are decoded again: a handful, known at the end only."""
    inputs, chosen = tools.inputs, sorted({i for row in extremes_shown(psnr).values() for i in row})
    parts = [functional.to_uint8(Reconstructed(*made).images).cpu() for made in inputs.reconstruct(num_steps, chosen)]
    return extreme_gallery(
        tools.pictures,
        inputs.val_images,
        dict(zip(chosen, torch.cat(parts), strict=True)),
        psnr,
        class_ids=inputs.val_labels,
        class_names=inputs.class_names,
    )


def _step_measures(tools: Instruments, num_steps: int, seen: _Seen) -> tuple[Measure, ...]:
    figures, n = seen.figures, seen.figures.count
    steps: dict[str, Any] = {"num_steps": num_steps, "temperature": tools.inputs.facts.temperature}
    pairs = {"reference": "the held-out images themselves", "num_reference": n, **steps}
    psnr_text = f"mean over images of 10 log10(255^2 / MSE over RGB), identical images {functional.PSNR_CEILING:.0f} dB"
    ssim_text = "Gaussian 11x11, sigma 1.5, no padding, mean over positions and RGB, then over images"
    read = tools.reader.read_thumbnails(figures["thumbnails"].numpy()) if tools.reader else None
    measures = [
        Measure(
            name=f"reconstruction.psnr@{num_steps}",
            label="PSNR",
            unit="dB",
            better="higher",
            value=figures["psnr"].mean().item(),
            protocol=tools.protocol(n, definition=psnr_text, **pairs),
        ),
        Measure(
            name=f"reconstruction.ssim@{num_steps}",
            label="SSIM",
            better="higher",
            value=figures["ssim"].mean().item(),
            protocol=tools.protocol(n, definition=ssim_text, **pairs),
        ),
        Measure(
            name=f"reconstruction.l1@{num_steps}",
            label="L1",
            better="lower",
            value=figures["l1"].mean().item(),
            protocol=tools.protocol(n, definition="mean absolute error over RGB in [0, 1], then over images", **pairs),
        ),
        Measure(
            name=f"reconstruction.l2@{num_steps}",
            label="L2",
            better="lower",
            value=figures["l2"].mean().item(),
            protocol=tools.protocol(n, definition="mean squared error over RGB in [0, 1], then over images", **pairs),
        ),
        _lpips(tools, num_steps, figures, pairs),
        Measure(
            name=f"reconstruction.code_agreement@{num_steps}",
            label="Code agreement with the teacher",
            unit="%",
            better="higher",
            value=figures["code_agreement"].mean().item(),
            protocol=tools.protocol(
                n,
                reference="the teacher's codes of the held-out images",
                num_reference=n,
                rounding="",
                dtype="",
                definition="share of positions with the teacher's code",
                **steps,
            ),
        ),
        Measure(
            name=f"reconstruction.fd_random@{num_steps}",
            label=tools.features.label,
            better="lower",
            value=tools.frechet(figures["features"], tools.val_moments),
            protocol=tools.feature_protocol(n, "real held-out images", n, **steps),
        ),
        tools.read(
            f"reconstruction.class_agreement@{num_steps}",
            "Reconstructions keep their class",
            read,
            tools.inputs.val_labels,
            **steps,
        ),
    ]
    found = tuple(measure for measure in measures if measure is not None)
    scorer = tools.inputs.scorer
    if scorer is None or seen.scored is None:
        return found
    return (*found, *scorer.reconstruction(seen.scored, tools.inputs.val_images, num_steps, _decoding(tools)))


def _lpips(tools: Instruments, num_steps: int, figures: ImageMeter, pairs: dict[str, Any]) -> Measure | None:
    if "lpips" not in figures:
        return None
    definition = "VGG16, linear layers v0.1, RGB in [0, 1] times 2 minus 1, mean over images"
    return Measure(
        name=f"reconstruction.lpips@{num_steps}",
        label="LPIPS",
        better="lower",
        value=figures["lpips"].double().mean().item(),
        protocol=tools.protocol(figures.count, extractor="LPIPS (VGG16)", definition=definition, **pairs),
    )


def _decoding(tools: Instruments) -> dict[str, object]:
    return {"temperature": tools.inputs.facts.temperature, "seeds": tools.seeds}


def _codebook(tools: Instruments) -> tuple[tuple[Measure, ...], Histogram]:
    """Figures of the codes' use, and how often each occurs, the commonest first."""
    size = tools.inputs.facts.codebook_size
    measures, series = [], {}
    for split, given in (("held-out", tools.inputs.val_codes), ("training", tools.inputs.train_codes)):
        counts, count, length = _counted(given, size)
        series[f"{split} images"] = counts
        protocol = tools.protocol(
            count,
            rounding="",
            dtype="",
            reference=f"codebook of {size:,}",
            definition=f"codes of {split} images and their variants, {length} an image",
        )
        measures += [
            Measure(
                name=f"codebook.usage_{split.replace('-', '_')}",
                label=f"Codebook usage, {split}",
                unit="%",
                better="higher",
                value=functional.usage_of(counts),
                protocol=protocol,
            ),
            Measure(
                name=f"codebook.entropy_{split.replace('-', '_')}",
                label=f"Code entropy, {split}",
                unit="bits",
                better="higher",
                value=functional.entropy_of(counts),
                protocol=protocol,
            ),
            Measure(
                name=f"codebook.perplexity_{split.replace('-', '_')}",
                label=f"Code perplexity, {split}",
                unit="codes",
                better="higher",
                value=functional.perplexity_of(counts),
                protocol=protocol,
            ),
        ]
    return tuple(measures), _usage(series, size)


def _usage(series: dict[str, Tensor], size: int) -> Histogram:
    """Shares of all codes by rank, in at most `_BARS` groups of neighbouring ranks."""
    edges = torch.linspace(0, size, min(size, _BARS) + 1).round().long()
    shares = {}
    for name, counts in series.items():
        falling = counts.double().sort(descending=True).values / counts.sum()
        heights = [falling[a:b].mean().item() for a, b in itertools.pairwise(edges.tolist())]
        shares[name] = tuple(heights)
    return Histogram(
        title="How often codes occur, the commonest first",
        axis=f"rank of the code, of {size:,}",
        edges=tuple(edges.double().tolist()),
        series=shares,
    )


def _counted(codes: ArrayLike | CodeBatches, codebook_size: int) -> tuple[Tensor, int, int]:
    """How often each code occurs, (K) int64; the rows; and the codes a row."""
    counts, rows, length = torch.zeros(codebook_size, dtype=torch.int64), 0, 0
    for batch in code_batches(codes):
        counts += functional.code_counts(batch, codebook_size)
        rows, length = rows + len(batch), batch.shape[1]
    return counts, rows, length
