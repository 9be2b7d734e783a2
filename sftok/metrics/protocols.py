"""Protocols: everything that a score of images depends on, under one name. Scores of different protocols never compare.

A protocol is data; `sftok.metrics.measure.measure` computes its scores.
"""

from typing import Literal, Self

from pydantic import Field, model_validator

from infra.config import Config
from sftok.metrics.inception.prepared import Precision
from sftok.metrics.inception.resize import Resize
from sftok.metrics.inception.weights import EXTRACTOR, PUBLISHED_SHA256
from sftok.metrics.resampling import POINTS

ScoreName = Literal["fid", "sfid", "inception_score", "kid", "precision", "recall", "density", "coverage"]
LABELS: dict[ScoreName, str] = {
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "Inception Score",
    "kid": "KID",
    "precision": "Precision",
    "recall": "Recall",
    "density": "Density",
    "coverage": "Coverage",
}
# The usual names of some scores imply Inception's features; for other features they have neutral names.
NEUTRAL: dict[ScoreName, str] = LABELS | {"fid": "FD", "sfid": "spatial FD", "kid": "Kernel distance"}
BETTER: dict[ScoreName, Literal["higher", "lower"]] = {
    score: "lower" if score in ("fid", "sfid", "kid") else "higher" for score in LABELS
}
_ROUNDING = "floats clamped to [0, 1], times 255, half to even, uint8"


class ScoreProtocol(Config):
    """The parameters of scores of images."""

    name: str = Field(description="name of the protocol; another N has another name")
    scores: tuple[ScoreName, ...] = Field(min_length=1, description="in the order in which they are printed")
    num_images: int = Field(ge=20, description="N: number of images scored; of more, the first N")
    reference: str = Field(description="the reference, in words")
    num_reference: int = Field(ge=0, description="smallest number of reference images; 0: any, even unknown")
    extractor: str = Field(description="network of the features")
    extractor_sha256: str = Field(
        pattern=r"^[0-9a-f]{64}$", description="of the extractor's file, or of the bytes of its weights"
    )
    features: str = Field("", description="name in brackets after each label if the features are not Inception's")
    resize: Resize | Literal["none"] = Field(description="resizing of images to the extractor's size")
    rounding: str = Field(_ROUNDING, description="conversion of floats to the pixels that are scored")
    precision: Precision = Field("fp32", description="of the features; all later arithmetic is float64")
    score_splits: int = Field(0, ge=0, description="Inception Score: number of equal splits; 0: use `score_split_size`")
    score_split_size: int = Field(5000, ge=1, description="Inception Score: images per split, fewer in the last")
    score_seed: int | None = Field(None, description="Inception Score: seed of the shuffle; null: in order")
    kid_subsets: int = Field(100, ge=1, description="KID: pairs of subsets, drawn without replacement")
    kid_subset_size: int = Field(1000, ge=2, description="KID: samples, and references, per subset")
    kid_seed: int = Field(2020, description="KID: seed of the draws")
    kid_reference_first: bool = Field(False, description="KID: draw a subset's references before its samples")
    neighbours: int = Field(3, ge=1, description="precision and recall: k")
    density_neighbours: int = Field(5, ge=1, description="density and coverage: k")
    replicates: int = Field(20, ge=2, description="intervals: number of subsamples")
    points: int = Field(POINTS, ge=2, description="extrapolation: number of sizes")
    seed: int = Field(0, description="of intervals and extrapolations")

    @model_validator(mode="after")
    def _fid_means_inception(self) -> Self:
        if self.extractor != EXTRACTOR and not self.features:
            raise ValueError(
                f'features = "": scores of {self.extractor} are not what Inception\'s are called; name the features'
            )
        return self

    @property
    def is_inception(self) -> bool:
        """Whether scores have their usual names."""
        return not self.features

    def label(self, score: ScoreName) -> str:
        """Label a score under this protocol: "FID" for Inception's features only."""
        return LABELS[score] if self.is_inception else f"{NEUTRAL[score]} ({self.features})"

    def at(self, num_images: int, **changes: object) -> "ScoreProtocol":
        """Derive the protocol of another N, named accordingly; KID's subsets are no larger than N."""
        fitting = {"num_reference": 0, "kid_subset_size": min(self.kid_subset_size, num_images)}
        name = f"{self.name.split('/')[0]}/{num_images}"
        return ScoreProtocol.model_validate(dict(self) | fitting | changes | {"name": name, "num_images": num_images})

    def definition(self, score: ScoreName) -> str:
        """State the formula or convention of a score, in words."""
        shuffle = "in order" if self.score_seed is None else f"shuffled with seed {self.score_seed}"
        splits = f"{self.score_splits} equal splits" if self.score_splits else f"splits of {self.score_split_size}"
        frechet_of = "|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of {}, unbiased covariances, float64"
        return {
            "fid": frechet_of.format("2,048 pool features" if self.is_inception else self.features),
            "sfid": frechet_of.format("2,023 spatial features: 7 channels of the 17 x 17 map mixed_6"),
            "inception_score": f"logits without the bias, {splits}, {shuffle}",
            "kid": f"unbiased, kernel (x'y / D + 1)^3, {self.kid_subsets} subsets of {self.kid_subset_size}, "
            f"seed {self.kid_seed}",
            "precision": f"samples within k-nearest-neighbour balls of references, k = {self.neighbours}",
            "recall": f"references within k-nearest-neighbour balls of samples, k = {self.neighbours}",
            "density": f"balls of references around a sample, over k = {self.density_neighbours}",
            "coverage": f"references whose ball holds a sample, k = {self.density_neighbours}",
        }[score]


_INCEPTION = {"extractor": EXTRACTOR, "extractor_sha256": PUBLISHED_SHA256, "num_images": 50_000}
_NEIGHBOURS: tuple[ScoreName, ...] = ("precision", "recall", "density", "coverage")

TORCH_FIDELITY = ScoreProtocol(
    **_INCEPTION,
    name="torch_fidelity",  # except precision and recall, for which the tool defaults to VGG-16
    scores=("fid", "inception_score", "kid", *_NEIGHBOURS),
    reference="the images that the samples stand for",
    num_reference=1000,
    resize="tensorflow_bilinear",
    score_splits=10,
    score_seed=2020,
)
CLEAN = ScoreProtocol(
    **_INCEPTION,
    name="clean",
    scores=("fid", "kid"),
    reference="the images that the samples stand for, resized alike",
    num_reference=1000,
    resize="pillow_bicubic",
    kid_seed=0,  # clean-fid draws from NumPy's global generator, whatever its state
    kid_reference_first=True,
)
ADM = ScoreProtocol(
    **_INCEPTION,
    name="adm",
    scores=("fid", "sfid", "inception_score", "precision", "recall"),
    reference="ADM's file of the data set: statistics of all of it, images of 10,000 for precision and recall",
    num_reference=0,  # the file does not state the number of images of its statistics
    resize="tensorflow_bilinear",
)
PROTOCOLS = {protocol.name: protocol for protocol in (TORCH_FIDELITY, CLEAN, ADM)}


def random_features(extractor: str, sha256: str, num_images: int) -> ScoreProtocol:
    """Make the protocol of random features, which need no downloaded weights: for demonstrations; never called FID."""
    return ScoreProtocol(
        name=f"random_features/{num_images}",
        scores=("fid", "kid", *_NEIGHBOURS),
        num_images=num_images,
        reference="the images that the samples stand for",
        num_reference=0,
        extractor=extractor,
        extractor_sha256=sha256,
        features="random features",
        resize="none",
        kid_subset_size=min(1000, num_images),
    )
