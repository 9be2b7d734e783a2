"""Scores of generated images: distance to real images, class agreement, and signs of memorization."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sftok.evaluation.meters import Meters, as_codes, code_batches, rows_of
from sftok.evaluation.results import Histogram, Score
from sftok.evaluation.samples import SampleSummary
from sftok.metrics import functional
from sftok.metrics.frechet import frechet_distance

_BINS = 32


class GenerationOutcome(NamedTuple):
    """Scores of the samples, and what is shown beside them."""

    scores: tuple[Score, ...]
    predicted: Tensor | None
    """class that the reader sees in each sample, (n) int64; None without a reader."""
    predicted_real: Tensor | None
    """class that it sees in each held-out image."""
    distances: Histogram


def measure_generation(meters: Meters, samples: SampleSummary) -> GenerationOutcome:
    """Score the samples against real images: as distributions, by class, and image by image."""
    inputs, predicted = meters.inputs, None
    predicted_real = meters.reader.read(inputs.val_images) if meters.reader else None
    nearest, nearest_real = meters.nearest
    if meters.reader is not None and samples.thumbnails is not None:
        predicted = meters.reader.read_thumbnails(samples.thumbnails.numpy())
    scores = (
        *_distance_scores(meters, samples.features),
        _mean_image_score(meters),
        *_class_scores(meters, predicted, predicted_real, samples.classes),
        *_memory_scores(meters, nearest.distances, nearest_real.distances),
    )
    if inputs.scorer is not None and samples.scored is not None:
        facts = {**meters.sampling(), "seeds": meters.seeds}
        scores += inputs.scorer.generation(samples.scored, facts)
    return GenerationOutcome(scores, predicted, predicted_real, _histogram(nearest.distances, nearest_real.distances))


def _distance_scores(meters: Meters, features_ND: Tensor) -> tuple[Score, ...]:
    """Score samples by Fréchet distance, also at the N of the floor (N biases it), and held-out images as the floor."""
    val, train = meters.inputs.val_images, meters.inputs.train_images
    few = torch.from_numpy(meters.random.permutation(len(features_ND))[: len(val)])
    label, reference = meters.features.label, ("real training images", len(train))
    return (
        Score(
            name="generation.fd_random",
            label=f"{label}, samples",
            better="lower",
            value=meters.frechet(features_ND, meters.train_moments),
            protocol=meters.feature_protocol(len(features_ND), *reference, **meters.sampling()),
        ),
        Score(
            name="generation.fd_random_same_n",
            label=f"{label}, as many samples as held-out images",
            better="lower",
            value=meters.frechet(features_ND[few], meters.train_moments),
            protocol=meters.feature_protocol(len(few), *reference, **meters.sampling()),
        ),
        Score(
            name="real.fd_random",
            label=f"{label}, real held-out images (floor)",
            value=frechet_distance(meters.val_moments, meters.train_moments),
            protocol=meters.feature_protocol(len(val), *reference),
        ),
    )


def _mean_image_score(meters: Meters) -> Score:
    """Score the mean training image as a reconstruction of every held-out image: what needs no codes at all."""
    images = meters.inputs.val_images
    return Score(
        name="real.psnr_mean_image",
        label="PSNR of the mean training image (floor of reconstructions)",
        unit="dB",
        value=functional.psnr(meters.mean_image.expand_as(images), images).mean().item(),
        protocol=meters.protocol(
            len(images),
            reference="real training images",
            num_reference=len(meters.inputs.train_images),
            definition="mean over held-out images of the PSNR of the mean training image",
        ),
    )


def _class_scores(
    meters: Meters, predicted: Tensor | None, predicted_real: Tensor | None, classes: Tensor
) -> tuple[Score, ...]:
    """Score class agreement of samples, of real held-out images, and of samples with shuffled labels (control)."""
    shuffled = classes[torch.from_numpy(meters.random.permutation(len(classes)))]
    scores = (
        meters.class_agreement(
            "generation.class_agreement", "Class agreement, samples", predicted, classes, **meters.sampling()
        ),
        meters.class_agreement(
            "real.class_agreement",
            "Class agreement, real held-out images",
            predicted_real,
            meters.inputs.val_labels,
        ),
        meters.class_agreement(
            "generation.class_agreement_shuffled",
            "Class agreement, samples with shuffled labels (control)",
            predicted,
            shuffled,
            reference="classes of the samples, shuffled",
            **meters.sampling(),
        ),
    )
    return tuple(score for score in scores if score is not None)


def _memory_scores(meters: Meters, sample_distance: Tensor, real_distance: Tensor) -> tuple[Score, ...]:
    """Score memorization: nearest training images and verbatim codes, with held-out images as the baseline."""
    sample_codes, val_codes = as_codes(meters.inputs.sample_codes), as_codes(meters.inputs.val_codes)
    verbatim = functional.verbatim_shares([sample_codes, val_codes], code_batches(meters.inputs.train_codes))
    num_train, num_codes = len(meters.inputs.train_images), rows_of(meters.inputs.train_codes)
    scores = []
    for who, label, codes, share, distance, facts in (
        ("generation", "samples", sample_codes, verbatim[0], sample_distance, meters.sampling()),
        ("real", "real held-out images", val_codes, verbatim[1], real_distance, {}),
    ):
        scores += [
            Score(
                name=f"{who}.nearest_distance",
                label=f"Median distance to the nearest training image, {label}",
                value=distance.median().item(),
                protocol=meters.protocol(
                    len(distance),
                    reference="real training images",
                    num_reference=num_train,
                    definition="Euclidean over RGB pixels in [0, 1]",
                    **facts,
                ),
            ),
            Score(
                name=f"{who}.verbatim_share",
                label=f"Code sequences found verbatim in training, {label}",
                unit="%",
                value=share,
                protocol=meters.protocol(
                    len(codes),
                    reference="codes of training images, all variants",
                    num_reference=num_codes,
                    rounding="",
                    dtype="",
                    definition="share whose whole sequence of codes occurs there",
                    **facts,
                ),
            ),
        ]
    distinct = Score(
        name="generation.distinct_share",
        label="Distinct code sequences, samples",
        unit="%",
        better="higher",
        value=functional.distinct_share(sample_codes),
        protocol=meters.protocol(
            len(sample_distance),
            rounding="",
            dtype="",
            definition="distinct sequences of codes over samples",
            **meters.sampling(),
        ),
    )
    return (*scores, distinct)


def _histogram(samples: Tensor, real: Tensor) -> Histogram:
    edges = np.histogram_bin_edges(np.concatenate([samples, real]), bins=_BINS)
    series = {
        name: tuple((np.histogram(values, bins=edges)[0] / len(values)).tolist())
        for name, values in (("samples", samples), ("held-out images", real))
    }
    return Histogram(
        title="Distance to the nearest training image",
        axis="Euclidean distance over RGB pixels in [0, 1]",
        edges=tuple(edges.tolist()),
        series=series,
    )
