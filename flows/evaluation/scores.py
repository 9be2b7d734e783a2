"""FID and related scores of reconstructions and samples, under the protocol that the recipe names."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from flows.evaluation.features import (
    PassingFeatures,
    feature_shards,
    features_of,
    joined,
    of_real_images,
    of_reconstructions,
    of_samples,
)
from flows.evaluation.reference import real_images
from flows.recipes.schema import ScoresConfig
from flows.stage import Work
from infra.store.store import Store
from sftok.evaluation.meters import FeatureMeter
from sftok.evaluation.results import Protocol, Score
from sftok.metrics.inception.prepared import PreparedInception, prepare_inception
from sftok.metrics.inception.resize import Resize
from sftok.metrics.inception.weights import PUBLISHED_SHA256, read_inception
from sftok.metrics.measure import Features, ImageScore, Reference, measure
from sftok.metrics.protocols import PROTOCOLS, ScoreProtocol
from sftok.metrics.reference_file import has_images, read_images, read_statistics

OTHER_WEIGHTS = "Inception's layers, other weights"  # scores with them are not called FID
FEWEST = 20  # images that a protocol needs at least


class Scorer(NamedTuple):
    """Scorer of images under one protocol."""

    protocol: ScoreProtocol
    network: PreparedInception
    resize: Resize
    reference: Callable[[], Reference]
    """of samples; computed when first needed."""
    num_samples: int | None
    kept: Callable[[int | None], PassingFeatures] | None = None
    """makes meters that store the features of reconstructions in so many steps, or of samples; None: not stored."""
    originals: Callable[[], Features] | None = None
    """features of the held-out images, computed by workers; None: computed from the images given."""
    seed: int = 0

    def meter(self, num_steps: int | None = None) -> PassingFeatures:
        """Return a meter for the held-out images' reconstructions in `num_steps`, in order; for the samples if None."""
        return self.kept(num_steps) if self.kept else PassingFeatures(self.network, self.resize)

    def reconstruction(
        self, meter: FeatureMeter, originals: Tensor, num_steps: int, facts: dict[str, object]
    ) -> tuple[Score, ...]:
        """Score reconstructions against their originals.

        Raises:
            ValueError: there are too few images.
        """
        protocol = self._at(len(originals))
        features = meter.features()
        real = self.originals() if self.originals else features_of(self.network, originals, self.resize)
        if not len(features) == len(real) == len(originals):
            raise ValueError(
                f"features of {len(features)} reconstructions and {len(real)} originals, of {len(originals)} images: "
                "delete the folders of features and evaluate again"
            )
        reference = Reference.of(real, protocol, "the held-out images themselves")
        scores = measure(protocol, features, reference, device=self.network.device)
        return scores_of(scores, "reconstruction", f"@{num_steps}", {**facts, "num_steps": num_steps})

    def generation(self, meter: FeatureMeter, facts: dict[str, object]) -> tuple[Score, ...]:
        """Score samples against the reference, in an order drawn by the seed.

        Samples are stored class by class: without shuffling, the first ones and each split of the Inception Score would
        hold only some of the classes.

        Raises:
            ValueError: there are fewer samples than the protocol takes.
        """
        wanted = self.num_samples or self.protocol.num_images
        protocol, found = self._at(wanted), meter.features()
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(self.seed))[:wanted]
        scores = measure(protocol, found.rows(order), self.reference(), device=self.network.device)
        return scores_of(scores, "generation", "", facts)

    def _at(self, count: int) -> ScoreProtocol:
        """Return the protocol for `count` images; its name states a number other than its own."""
        if count < FEWEST:
            raise ValueError(f"{self.protocol.name} scores {FEWEST} images at least, there are {count}")
        return self.protocol if count == self.protocol.num_images else self.protocol.at(count)


def scorer_of(work: Work) -> Scorer | None:
    """Return the scorer of a run; None if the recipe asks for none.

    Raises:
        ValueError: the weights are missing or are not the expected ones, or the reference cannot be read.
    """
    config = work.recipe.evaluate.scores
    if config.protocol == "none":
        return None
    network = read_inception(config.inception, work.job.store, "evaluate.scores.inception")
    given = ReferenceFile.read(config.reference) if config.reference else None
    protocol = protocol_of(config, given)
    assert protocol.resize != "none"
    prepared = prepare_inception(network, precision=config.precision, device=work.job.device)

    def reference() -> Reference:
        if given is not None:
            return given.reference(protocol, prepared)
        return real_images(work, config, protocol, work.recipe.seed)

    def kept(num_steps: int | None) -> PassingFeatures:
        if num_steps is None:
            return of_samples(work, config, protocol, prepared)
        return of_reconstructions(work, config, protocol, prepared, num_steps)

    def originals() -> Features:
        return joined(feature_shards(of_real_images(work, config, protocol, "val")))

    return Scorer(
        protocol, prepared, protocol.resize, reference, config.num_samples, kept, originals, seed=work.recipe.seed
    )


class ReferenceFile(NamedTuple):
    """An .npz file of statistics, and possibly images, as published by ADM and clean-fid."""

    name: str
    data: bytes
    what: str
    """name in errors."""

    @classmethod
    def read(cls, uri: str) -> "ReferenceFile":
        """Read a local file, or one of a store.

        Raises:
            ValueError: there is no such file.
        """
        what = f"evaluate.scores.reference = {uri!r}"
        folder, name = Store.beside(uri)
        try:
            return cls(name, folder.read(name), what)
        except FileNotFoundError as error:
            raise ValueError(f"{what}: there is no such file") from error

    @property
    def has_images(self) -> bool:
        """Return whether it has images, which precision, recall and KID need."""
        return has_images(self.data, self.what)

    def reference(self, protocol: ScoreProtocol, network: PreparedInception) -> Reference:
        """Return its statistics, and features of its images if it has any.

        Raises:
            ValueError: it is damaged, or of another format.
        """
        made, features = read_statistics(self.data, self.what), None
        if self.has_images:
            assert protocol.resize != "none"
            parts = [features_of(network, images, protocol.resize) for images in read_images(self.data, self.what)]
            features = joined(parts).pool
        return Reference(f"the statistics of {self.name}", made.pool, made.spatial, features, resize=protocol.resize)


def protocol_of(config: ScoresConfig, given: ReferenceFile | None = None) -> ScoreProtocol:
    """Return the named protocol with the recipe's weights; with unpublished weights, no score is called FID."""
    protocol = PROTOCOLS[config.protocol]
    changes: dict[str, object] = {"precision": config.precision, "extractor_sha256": config.inception.sha256}
    if config.inception.sha256 != PUBLISHED_SHA256:
        changes["features"] = OTHER_WEIGHTS
    if given is not None and not given.has_images:  # scores that need features of single images are left out
        changes["scores"] = tuple(s for s in protocol.scores if s in ("fid", "sfid", "inception_score"))
    return ScoreProtocol.model_validate({**dict(protocol), **changes})


def scores_of(scores: tuple[ImageScore, ...], what: str, suffix: str, facts: dict[str, object]) -> tuple[Score, ...]:
    """Convert scores to those of the report, each with its protocol; an extrapolation to infinite N is one more."""
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
            Score(
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
                Score(
                    name=f"{name}_infinity{suffix}",
                    label=f"{label}, extrapolated in 1/N",
                    value=score.at_infinity.value,
                    better=score.better,
                    protocol=told.model_copy(update={"definition": definition}),
                )
            )
    return tuple(made)
