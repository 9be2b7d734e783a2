"""Figures of a run that rules judge it by: of its trainings, its codes, its reconstructions and its samples."""

import math

from pydantic import Field

from flows.results.types import ConfusionMatrix, SweepPoint
from infra.config import Config


class Training(Config):
    """A training as far as it has come."""

    lines: tuple[dict[str, float], ...] = Field(description="of its log: the step, and figures by name")
    steps: int = Field(description="that it has when it ends")
    metrics: dict[str, float] = Field(default_factory=dict, description="of its artifact, once there is one")
    reachable: float = Field(1.0, description="share of the codebook that a validation finds in use, at best")

    def logged(self, name: str) -> list[tuple[int, float]]:
        """Return the steps at which a figure was logged, and its values."""
        return [(int(line["step"]), line[name]) for line in self.lines if name in line]

    def last(self, name: str) -> float | None:
        """Return the last value of a figure; None if it was not logged."""
        return next((line[name] for line in reversed(self.lines) if name in line), None)


class Figures(Config):
    """What was measured of a run, as far as it has come; what was not measured is empty."""

    trainings: dict[str, Training] = Field(default_factory=dict, description="by stage")
    metrics: dict[str, float] = Field(default_factory=dict, description="scores of the evaluation, by name")
    codebook_size: int = Field(0, description="of the tokenizer")
    reachable: float = Field(1.0, description="share of the codebook that training images use, at best")
    class_names: tuple[str, ...] = ()
    sweep: tuple[SweepPoint, ...] = ()
    confusion: ConfusionMatrix | None = Field(None, description="of samples; row = intended class")
    real_confusion: ConfusionMatrix | None = Field(None, description="of held-out images; row = class of the image")

    @property
    def psnr(self) -> float | None:
        """The PSNR of reconstructions in the largest number of decoding steps, in dB."""
        stepped = [name for name in self.metrics if name.startswith("reconstruction.psnr@")]
        return self.metrics[max(stepped, key=lambda name: int(name.partition("@")[2]))] if stepped else None

    @property
    def teacher_psnr(self) -> float | None:
        """The PSNR of the teacher's reconstructions in its last validation, in dB."""
        return self.trainings["teacher"].last("val_psnr") if "teacher" in self.trainings else None

    @property
    def mean_image_psnr(self) -> float | None:
        """The PSNR of the mean training image, in dB: what a reconstruction has that depends on no image."""
        return self.metrics.get("real.psnr_mean_image")

    @property
    def chance(self) -> float:
        """The share of images that are read as the class that is meant if classes are guessed."""
        return 1 / max(len(self.class_names), 1)

    @property
    def classes_shown(self) -> float | None:
        """Where samples are between chance (0) and real images (1) in being read as their class; None: not known.

        Nothing is known without a class reader, or from one that is closer to guessing than to certainty on real
        images.
        """
        drawn, real = (self.metrics.get(f"{who}.class_agreement") for who in ("generation", "real"))
        if drawn is None or real is None or self.chance == 1 or real < (1 + self.chance) / 2:
            return None
        return (drawn - self.chance) / (real - self.chance)


def reachable(codebook_size: int, codes: int) -> float:
    """Return the share of a codebook that so many codes use if all are equally likely."""
    return -math.expm1(codes * math.log1p(-1 / codebook_size)) if codebook_size > 1 else 1.0
