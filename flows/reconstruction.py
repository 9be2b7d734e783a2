"""How faithful images are that went through the tokenizer and back."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from flows.gallery import extreme_gallery, reconstruction_gallery, reconstructions_shown
from flows.instruments import CodeBatches, Instruments, Reconstructed, as_codes, code_batches
from flows.report_data import Histogram, Measure, ReconstructionReport, StepMeasures
from sftok import metrics

_BARS = 64  # of the drawing of the codes' use


def measure_reconstruction(
    tools: Instruments, steps: Sequence[int], *, step_done: Callable[[int], None]
) -> ReconstructionReport:
    """Reconstruct the held-out images at each number of decoding steps and compare; then count the codes.

    Of one number of steps all reconstructions are in memory; those that are shown are kept.
    """
    inputs, by_steps, shown, extremes = tools.inputs, [], {}, None
    indices = reconstructions_shown(inputs.val_labels)
    for done, num_steps in enumerate(steps):
        made = Reconstructed(*inputs.reconstruct(num_steps))
        shape, expected = tuple(made.images.shape), tuple(inputs.val_images.shape)
        if shape != expected:
            raise ValueError(f"reconstructions have shape {shape}, held-out images {expected}")
        by_steps.append(StepMeasures(num_steps=num_steps, measures=_step_measures(tools, num_steps, made)))
        shown[num_steps] = {index: metrics.to_uint8(made.images[index].clone()) for index in indices}
        if done == len(steps) - 1:
            extremes = extreme_gallery(
                tools.pictures,
                inputs.val_images,
                metrics.to_uint8(made.images),
                metrics.psnr(metrics.to_uint8(made.images), inputs.val_images),
                class_ids=inputs.val_labels,
                class_names=inputs.class_names,
            )
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


def _step_measures(tools: Instruments, num_steps: int, made: Reconstructed) -> tuple[Measure, ...]:
    images, originals = metrics.to_uint8(made.images), tools.inputs.val_images
    n, steps = len(images), {"num_steps": num_steps, "temperature": tools.inputs.facts.temperature}
    pairs = {"reference": "the held-out images themselves", "num_reference": n, **steps}
    psnr_text = f"mean over images of 10 log10(255^2 / MSE over RGB), identical images {metrics.PSNR_CEILING:.0f} dB"
    ssim_text = "Gaussian 11x11, sigma 1.5, no padding, mean over positions and RGB, then over images"
    agreement = metrics.code_agreement(as_codes(made.proxy_codes), as_codes(made.teacher_codes))
    measures = [
        Measure(
            name=f"reconstruction.psnr@{num_steps}",
            label="PSNR",
            unit="dB",
            better="higher",
            value=metrics.psnr(images, originals).mean().item(),
            protocol=tools.protocol(n, definition=psnr_text, **pairs),
        ),
        Measure(
            name=f"reconstruction.ssim@{num_steps}",
            label="SSIM",
            better="higher",
            value=metrics.ssim(images, originals).mean().item(),
            protocol=tools.protocol(n, definition=ssim_text, **pairs),
        ),
        Measure(
            name=f"reconstruction.l1@{num_steps}",
            label="L1",
            better="lower",
            value=metrics.l1(images, originals).mean().item(),
            protocol=tools.protocol(n, definition="mean absolute error over RGB in [0, 1], then over images", **pairs),
        ),
        Measure(
            name=f"reconstruction.l2@{num_steps}",
            label="L2",
            better="lower",
            value=metrics.l2(images, originals).mean().item(),
            protocol=tools.protocol(n, definition="mean squared error over RGB in [0, 1], then over images", **pairs),
        ),
        _lpips(tools, num_steps, images, pairs),
        Measure(
            name=f"reconstruction.code_agreement@{num_steps}",
            label="Code agreement with the teacher",
            unit="%",
            better="higher",
            value=agreement.mean().item(),
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
            value=tools.frechet(images, tools.val_moments),
            protocol=tools.feature_protocol(n, "real held-out images", n, **steps),
        ),
        tools.read(
            f"reconstruction.class_agreement@{num_steps}",
            "Reconstructions keep their class",
            images,
            tools.inputs.val_labels,
            **steps,
        ),
    ]
    scorer = tools.inputs.scorer
    scores = scorer.reconstruction(images, originals, num_steps, _decoding(tools)) if scorer else ()
    return (*(measure for measure in measures if measure is not None), *scores)


def _lpips(tools: Instruments, num_steps: int, images: Tensor, pairs: dict[str, Any]) -> Measure | None:
    if tools.inputs.lpips is None:
        return None
    definition = "VGG16, linear layers v0.1, RGB in [0, 1] times 2 minus 1, mean over images"
    return Measure(
        name=f"reconstruction.lpips@{num_steps}",
        label="LPIPS",
        better="lower",
        value=tools.inputs.lpips(images, tools.inputs.val_images).double().mean().item(),
        protocol=tools.protocol(len(images), extractor="LPIPS (VGG16)", definition=definition, **pairs),
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
                value=metrics.usage_of(counts),
                protocol=protocol,
            ),
            Measure(
                name=f"codebook.entropy_{split.replace('-', '_')}",
                label=f"Code entropy, {split}",
                unit="bits",
                better="higher",
                value=metrics.entropy_of(counts),
                protocol=protocol,
            ),
            Measure(
                name=f"codebook.perplexity_{split.replace('-', '_')}",
                label=f"Code perplexity, {split}",
                unit="codes",
                better="higher",
                value=metrics.perplexity_of(counts),
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
        counts += metrics.code_counts(batch, codebook_size)
        rows, length = rows + len(batch), batch.shape[1]
    return counts, rows, length
