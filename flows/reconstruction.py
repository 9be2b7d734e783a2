"""How faithful images are that went through the tokenizer and back."""

from collections.abc import Callable, Sequence

from flows.gallery import reconstruction_gallery
from flows.instruments import Instruments, Reconstructed, as_codes
from flows.report_data import Measure, ReconstructionReport, StepMeasures
from sftok import metrics


def measure_reconstruction(
    tools: Instruments, steps: Sequence[int], *, step_done: Callable[[int], None]
) -> ReconstructionReport:
    """Reconstruct the held-out images at each number of decoding steps and compare; then count the codes."""
    inputs, by_steps, images = tools.inputs, [], {}
    for done, num_steps in enumerate(steps):
        made = Reconstructed(*inputs.reconstruct(num_steps))
        shape, expected = tuple(made.images.shape), tuple(inputs.val_images.shape)
        if shape != expected:
            raise ValueError(f"reconstructions have shape {shape}, held-out images {expected}")
        by_steps.append(StepMeasures(num_steps=num_steps, measures=_step_measures(tools, num_steps, made)))
        images[num_steps] = metrics.to_uint8(made.images)
        step_done(done + 1)
    gallery = reconstruction_gallery(
        tools.pictures, inputs.val_images, images, class_ids=inputs.val_labels, class_names=inputs.class_names
    )
    return ReconstructionReport(by_steps=tuple(by_steps), measures=_codebook_measures(tools), gallery=gallery)


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
    return tuple(measure for measure in measures if measure is not None)


def _codebook_measures(tools: Instruments) -> tuple[Measure, ...]:
    size = tools.inputs.facts.codebook_size
    measures = []
    for split, given in (("held-out", tools.inputs.val_codes), ("training", tools.inputs.train_codes)):
        codes = as_codes(given)
        protocol = tools.protocol(
            len(codes),
            rounding="",
            dtype="",
            reference=f"codebook of {size:,}",
            definition=f"codes of {split} images and their variants, {codes.shape[1]} an image",
        )
        measures += [
            Measure(
                name=f"codebook.usage_{split.replace('-', '_')}",
                label=f"Codebook usage, {split}",
                unit="%",
                better="higher",
                value=metrics.codebook_usage(codes, size),
                protocol=protocol,
            ),
            Measure(
                name=f"codebook.entropy_{split.replace('-', '_')}",
                label=f"Code entropy, {split}",
                unit="bits",
                better="higher",
                value=metrics.entropy_bits(codes, size),
                protocol=protocol,
            ),
            Measure(
                name=f"codebook.perplexity_{split.replace('-', '_')}",
                label=f"Code perplexity, {split}",
                unit="codes",
                better="higher",
                value=metrics.perplexity(codes, size),
                protocol=protocol,
            ),
        ]
    return tuple(measures)
