"""How good generated images are, and whether they are copies."""

import numpy as np
import torch
from torch import Tensor

from flows.gallery import neighbour_gallery, sample_gallery
from flows.instruments import Instruments, as_codes, code_batches, rows_of
from flows.report_data import ConfusionMatrix, GenerationReport, Histogram, Measure
from sftok import metrics
from sftok.class_agreement import confusion_matrix
from sftok.frechet import frechet_distance

_BINS = 32


def measure_generation(tools: Instruments) -> GenerationReport:
    """Decode the samples and compare them with real images: as distributions, by class, and one by one."""
    inputs = tools.inputs
    samples, classes = metrics.to_uint8(inputs.decode_samples()), as_codes(inputs.sample_classes)
    if len(samples) != len(classes):
        raise ValueError(f"{len(samples)} decoded samples, but {len(classes)} sample classes")
    names = inputs.class_names
    looked = _evenly(len(samples), tools.nearest_images)
    held_out = inputs.val_images[_evenly(len(inputs.val_images), tools.nearest_images)]
    nearest, nearest_real = metrics.nearest_distances([samples[looked], held_out], inputs.train_images)
    measures = (
        *_distance_measures(tools, samples),
        *_class_measures(tools, samples, classes),
        *_memory_measures(tools, nearest.distances, nearest_real.distances),
        *(inputs.scorer.generation(samples, {**tools.sampling(), "seeds": tools.seeds}) if inputs.scorer else ()),
    )
    confusion = None
    if tools.reader is not None:
        counts = confusion_matrix(tools.reader.read(samples), classes, len(names))
        confusion = ConfusionMatrix(counts=tuple(tuple(row) for row in counts.tolist()))
    return GenerationReport(
        measures=measures,
        gallery=sample_gallery(tools.pictures, samples, class_ids=classes, class_names=names),
        neighbours=neighbour_gallery(
            tools.pictures,
            samples[looked],
            nearest=nearest,
            train=inputs.train_images,
            class_ids=classes[looked],
            class_names=names,
        ),
        distances=_histogram(nearest.distances, nearest_real.distances),
        confusion=confusion,
    )


def _evenly(count: int, most: int) -> Tensor:
    """Indices of at most `most` of `count`, spread evenly: each is compared with every training image."""
    return torch.linspace(0, count - 1, min(count, most)).round().long()


def _distance_measures(tools: Instruments, samples: Tensor) -> tuple[Measure, ...]:
    """Distance of samples to real images, also at the N of the floor (N biases it), and the floor of real images."""
    val, train = tools.inputs.val_images, tools.inputs.train_images
    few = torch.from_numpy(tools.random.permutation(len(samples))[: len(val)])
    label, reference = tools.features.label, ("real training images", len(train))
    return (
        Measure(
            name="generation.fd_random",
            label=f"{label}, samples",
            better="lower",
            value=tools.frechet(samples, tools.train_moments),
            protocol=tools.feature_protocol(len(samples), *reference, **tools.sampling()),
        ),
        Measure(
            name="generation.fd_random_same_n",
            label=f"{label}, no more samples than held-out images",
            better="lower",
            value=tools.frechet(samples[few], tools.train_moments),
            protocol=tools.feature_protocol(len(few), *reference, **tools.sampling()),
        ),
        Measure(
            name="real.fd_random",
            label=f"{label}, real held-out images (the floor)",
            value=frechet_distance(tools.val_moments, tools.train_moments),
            protocol=tools.feature_protocol(len(val), *reference),
        ),
    )


def _class_measures(tools: Instruments, samples: Tensor, classes: Tensor) -> tuple[Measure, ...]:
    """What the reader sees in samples; in real held-out images; and in samples whose labels were shuffled."""
    shuffled = classes[torch.from_numpy(tools.random.permutation(len(classes)))]
    read = (
        tools.read("generation.class_agreement", "Samples show their class", samples, classes, **tools.sampling()),
        tools.read(
            "real.class_agreement",
            "Real held-out images read rightly",
            tools.inputs.val_images,
            tools.inputs.val_labels,
        ),
        tools.read(
            "generation.class_agreement_shuffled",
            "Control: samples with shuffled labels",
            samples,
            shuffled,
            reference="classes of the samples, shuffled",
            **tools.sampling(),
        ),
    )
    return tuple(measure for measure in read if measure is not None)


def _memory_measures(tools: Instruments, sample_distance: Tensor, real_distance: Tensor) -> tuple[Measure, ...]:
    """Are samples copies? Distances in pixels and whole codes, beside those of held-out images, which are none."""
    sample_codes, val_codes = as_codes(tools.inputs.sample_codes), as_codes(tools.inputs.val_codes)
    verbatim = metrics.verbatim_shares([sample_codes, val_codes], code_batches(tools.inputs.train_codes))
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
        value=metrics.distinct_share(sample_codes),
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
