"""How good generated images are, and whether they are copies."""

import numpy as np
import torch
from torch import Tensor

from flows.evaluation.gallery import neighbour_gallery, sample_gallery
from flows.evaluation.meters import Instruments, as_codes, code_batches, rows_of
from flows.evaluation.samples import SamplesSeen
from flows.results.types import ConfusionMatrix, GenerationReport, Histogram, Measure
from sftok.metrics import functional
from sftok.metrics.class_reader import confusion_matrix
from sftok.metrics.frechet import frechet_distance

_BINS = 32


def measure_generation(tools: Instruments, samples: SamplesSeen) -> GenerationReport:
    """Compare the samples with real images: as distributions, by class, and one by one."""
    inputs, classes = tools.inputs, samples.classes
    names = inputs.class_names
    nearest, nearest_real = tools.nearest
    read = None
    if tools.reader is not None and samples.thumbnails is not None:
        read = tools.reader.read_thumbnails(samples.thumbnails.numpy())
    measures = (
        *_distance_measures(tools, samples.features),
        *_class_measures(tools, read, classes),
        *_memory_measures(tools, nearest.distances, nearest_real.distances),
    )
    if inputs.scorer is not None and samples.scored is not None:
        facts = {**tools.sampling(), "seeds": tools.seeds}
        measures += inputs.scorer.generation(samples.scored, facts)
    confusion = None
    if read is not None:
        counts = confusion_matrix(read, classes, len(names))
        confusion = ConfusionMatrix(counts=tuple(tuple(row) for row in counts.tolist()))
    return GenerationReport(
        measures=measures,
        gallery=sample_gallery(tools.pictures, samples.shown, class_ids=classes, class_names=names),
        neighbours=neighbour_gallery(
            tools.pictures,
            dict(zip(samples.looked.tolist(), samples.near, strict=True)),
            nearest=nearest,
            train=inputs.train_images,
            class_ids=classes[samples.looked],
            class_names=names,
        ),
        distances=_histogram(nearest.distances, nearest_real.distances),
        confusion=confusion,
    )


def _distance_measures(tools: Instruments, features_ND: Tensor) -> tuple[Measure, ...]:
    """Distance of samples to real images, also at the N of the floor (N biases it), and the floor of real images."""
    val, train = tools.inputs.val_images, tools.inputs.train_images
    few = torch.from_numpy(tools.random.permutation(len(features_ND))[: len(val)])
    label, reference = tools.features.label, ("real training images", len(train))
    return (
        Measure(
            name="generation.fd_random",
            label=f"{label}, samples",
            better="lower",
            value=tools.frechet(features_ND, tools.train_moments),
            protocol=tools.feature_protocol(len(features_ND), *reference, **tools.sampling()),
        ),
        Measure(
            name="generation.fd_random_same_n",
            label=f"{label}, no more samples than held-out images",
            better="lower",
            value=tools.frechet(features_ND[few], tools.train_moments),
            protocol=tools.feature_protocol(len(few), *reference, **tools.sampling()),
        ),
        Measure(
            name="real.fd_random",
            label=f"{label}, real held-out images (the floor)",
            value=frechet_distance(tools.val_moments, tools.train_moments),
            protocol=tools.feature_protocol(len(val), *reference),
        ),
    )


def _class_measures(tools: Instruments, seen: Tensor | None, classes: Tensor) -> tuple[Measure, ...]:
    """What the reader has seen in samples; in real held-out images; and in samples whose labels were shuffled."""
    shuffled = classes[torch.from_numpy(tools.random.permutation(len(classes)))]
    read = (
        tools.read("generation.class_agreement", "Samples show their class", seen, classes, **tools.sampling()),
        tools.read(
            "real.class_agreement",
            "Real held-out images read rightly",
            tools.reader.read(tools.inputs.val_images) if tools.reader else None,
            tools.inputs.val_labels,
        ),
        tools.read(
            "generation.class_agreement_shuffled",
            "Control: samples with shuffled labels",
            seen,
            shuffled,
            reference="classes of the samples, shuffled",
            **tools.sampling(),
        ),
    )
    return tuple(measure for measure in read if measure is not None)


def _memory_measures(tools: Instruments, sample_distance: Tensor, real_distance: Tensor) -> tuple[Measure, ...]:
    """Are samples copies? Distances in pixels and whole codes, beside those of held-out images, which are none."""
    sample_codes, val_codes = as_codes(tools.inputs.sample_codes), as_codes(tools.inputs.val_codes)
    verbatim = functional.verbatim_shares([sample_codes, val_codes], code_batches(tools.inputs.train_codes))
    num_train, num_codes = len(tools.inputs.train_images), rows_of(tools.inputs.train_codes)
    measures = []
    for who, label, codes, share, distance, facts in (
        ("generation", "samples", sample_codes, verbatim[0], sample_distance, tools.sampling()),
        ("real", "real held-out images", val_codes, verbatim[1], real_distance, {}),
    ):
        measures += [
            Measure(
                name=f"{who}.nearest_distance",
                label=f"Median distance to the nearest training image, {label}",
                value=distance.median().item(),
                protocol=tools.protocol(
                    len(distance),
                    reference="real training images",
                    num_reference=num_train,
                    definition="Euclidean over RGB pixels in [0, 1]",
                    **facts,
                ),
            ),
            Measure(
                name=f"{who}.verbatim_share",
                label=f"Codes verbatim in training, {label}",
                unit="%",
                value=share,
                protocol=tools.protocol(
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
    distinct = Measure(
        name="generation.distinct_share",
        label="Samples with codes of their own",
        unit="%",
        better="higher",
        value=functional.distinct_share(sample_codes),
        protocol=tools.protocol(
            len(sample_distance),
            rounding="",
            dtype="",
            definition="distinct sequences of codes over samples",
            **tools.sampling(),
        ),
    )
    return (*measures, distinct)


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
