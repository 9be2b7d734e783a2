"""FID and its kin of reconstructions and samples, under the protocol that the recipe names."""

import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from flows.feature_sets import feature_shards, features_of, joined, of_samples
from flows.recipe import ScoresConfig
from flows.reference import real_images
from flows.report_data import Measure, Protocol
from flows.stage import Work
from infra.store import Store
from infra.training import default_device
from sftok.inception_fast import PreparedInception, prepare_inception
from sftok.inception_file import PUBLISHED_SHA256, read_inception
from sftok.measures import Features, ImageScore, Reference, measure
from sftok.protocols import PROTOCOLS, ScoreProtocol
from sftok.reference_file import read_statistics
from sftok.resize import Resize

OTHER_WEIGHTS = "Inception's layers, other weights"  # what they find is no FID
FEWEST = 20  # images, below which no protocol scores


class Scorer(NamedTuple):
    """Scores images under one protocol."""

    protocol: ScoreProtocol
    network: PreparedInception
    resize: Resize
    reference: Callable[[], Reference]
    """of samples; taken when it is first needed."""
    num_samples: int | None
    features: Callable[[], Features] | None = None
    """of all samples, where workers take them; None: they are taken of the images given."""
    seed: int = 0

    def reconstruction(
        self, images: Tensor, originals: Tensor, num_steps: int, facts: dict[str, object]
    ) -> tuple[Measure, ...]:
        """Scores of reconstructions, held against their originals.

        Raises:
            ValueError: there are too few images.
        """
        protocol = self._at(len(images))
        features, real = (features_of(self.network, some, self.resize) for some in (images, originals))
        reference = Reference.of(real, protocol, "the held-out images themselves")
        scores = measure(protocol, features, reference)
        return measures_of(scores, "reconstruction", f"@{num_steps}", {**facts, "num_steps": num_steps})

    def generation(self, samples: Tensor, facts: dict[str, object]) -> tuple[Measure, ...]:
        """Scores of samples, held against the reference; those that are scored, and their order, a seed draws.

        Samples lie class by class: the first ones would be of the first classes, and so would the Inception Score's
        splits.

        Raises:
            ValueError: there are fewer samples than the protocol takes.
        """
        wanted = self.num_samples or self.protocol.num_images
        protocol = self._at(wanted)
        found = self.features() if self.features else features_of(self.network, samples, self.resize)
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(self.seed))[:wanted]
        scores = measure(protocol, found.rows(order), self.reference())
        return measures_of(scores, "generation", "", facts)

    def _at(self, count: int) -> ScoreProtocol:
        """The protocol, or that of another number of images, whose name says so."""
        if count < FEWEST:
            raise ValueError(f"{self.protocol.name} scores {FEWEST} images at least, there are {count}")
        return self.protocol if count == self.protocol.num_images else self.protocol.at(count)


def scorer_of(work: Work) -> Scorer | None:
    """What scores the images of a run; None where the recipe asks for nothing.

    Raises:
        ValueError: the weights are not there or are others; the reference cannot be read.
    """
    config = work.recipe.evaluate.scores
    if config.protocol == "none":
        return None
    network = read_inception(config.inception, work.job.store, "evaluate.scores.inception")
    protocol = protocol_of(config)
    assert protocol.resize != "none"
    prepared = prepare_inception(network, precision=config.precision, device=default_device())

    def reference() -> Reference:
        if config.reference:
            return reference_file(config.reference, protocol)
        return real_images(work, config, protocol, work.recipe.seed)

    def features() -> Features:
        return joined(feature_shards(work.job.store, of_samples(work, config, protocol)))

    return Scorer(protocol, prepared, protocol.resize, reference, config.num_samples, features, seed=work.recipe.seed)


def protocol_of(config: ScoresConfig) -> ScoreProtocol:
    """The named protocol with the recipe's weights: of others than the published ones no score is called FID."""
    protocol = PROTOCOLS[config.protocol]
    changes: dict[str, object] = {"precision": config.precision, "extractor_sha256": config.inception.sha256}
    if config.inception.sha256 != PUBLISHED_SHA256:
        changes["features"] = OTHER_WEIGHTS
    if config.reference:  # of statistics alone, what needs features one by one is left out, and not printed
        changes["scores"] = tuple(s for s in protocol.scores if s in ("fid", "sfid", "inception_score"))
    return ScoreProtocol.model_validate({**dict(protocol), **changes})


def reference_file(uri: str, protocol: ScoreProtocol) -> Reference:
    """The statistics of an .npz, local or in a store.

    Raises:
        ValueError: it is not there, or is no such file.
    """
    path = uri if "://" in uri else os.path.abspath(os.path.expanduser(uri))
    parent, _, name = path.rpartition("/")
    try:
        data = Store(parent or "/").read(name)
    except FileNotFoundError as error:
        raise ValueError(f"evaluate.scores.reference = {uri!r}: there is no such file") from error
    made = read_statistics(data, f"evaluate.scores.reference = {uri!r}")
    return Reference(f"the statistics of {name}", made.pool, made.spatial, resize=protocol.resize)


def measures_of(
    scores: tuple[ImageScore, ...], what: str, suffix: str, facts: dict[str, object]
) -> tuple[Measure, ...]:
    """Scores as figures of the report, each with its protocol; a distance at infinitely many images is one more."""
    made = []
    for score in scores:
        protocol = score.protocol
        told = Protocol.model_validate(
            {
                **facts,
                "num_images": score.num_images,
                "reference": score.reference,
                "num_reference": score.num_reference,
                "extractor": protocol.extractor,
                "extractor_sha256": protocol.extractor_sha256,
                "resize": f"{protocol.resize} to 299",
                "rounding": protocol.rounding,
                "dtype": f"{protocol.precision} features, float64 scores",
                "definition": f"protocol {protocol.name}; {score.definition}; interval: {score.interval_method}",
            }
        )
        name = f"{what}.{protocol.name.partition('/')[0]}.{score.name}"
        label = f"{score.label}, {protocol.name}"
        made.append(
            Measure(
                name=f"{name}{suffix}",
                label=label,
                value=score.value,
                better=score.better,
                interval=score.interval,
                protocol=told,
            )
        )
        if score.at_infinity is not None:
            definition = f"protocol {protocol.name}; {score.at_infinity.method}"
            made.append(
                Measure(
                    name=f"{name}_infinity{suffix}",
                    label=f"{label}, extrapolated in 1/N",
                    value=score.at_infinity.value,
                    better=score.better,
                    protocol=told.model_copy(update={"definition": definition}),
                )
            )
    return tuple(made)
