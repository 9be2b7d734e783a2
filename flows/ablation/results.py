"""Results of an ablation's arms, read from their artifacts: figures, training logs and inputs."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from pydantic import Field

from flows.ablation.arm import ARM
from flows.recipes.ablations import Ablation
from infra.artifacts.artifact import Artifact
from infra.artifacts.manifest import ArtifactRef
from infra.config import Config
from infra.store.store import Store
from infra.training.log import LOG
from sftok.evaluation.alignment import AlignmentMetrics, StepQuality
from sftok.evaluation.reconstruction import FIGURES, Figure

LOSS = "cross_entropy"  # of a tokenizer's training log


class LossPoint(Config):
    """A logged step, counted from the start of an arm's training."""

    step: int
    loss: float = Field(description="cross-entropy of the batch on the arm's own inputs, nats per position")


class Outcome(Config):
    """Result of one arm trained with one seed."""

    arm: str
    seed: int
    figures: AlignmentMetrics
    training: dict[str, int] = Field(description="steps of each training stage, in order, as its manifest counts them")
    loss: tuple[LossPoint, ...]
    refs: dict[str, ArtifactRef] = Field(description="the evaluated artifact, and its inputs")

    @property
    def steps(self) -> int:
        """Training steps of encoder, quantizer and decoder."""
        return sum(self.training.values())


STEP_METRICS = tuple(FIGURES[name] for name in ("psnr", "ssim", "fd_random", "code_agreement"))
"""of reconstructions in a number of decoding steps; `StepQuality` has a field of each name"""


class Column(NamedTuple):
    """A metric of every outcome, as a table or a sentence names it."""

    key: str
    label: str
    better: Literal["higher", "lower", ""]
    unit: str
    of: Callable[[AlignmentMetrics], float]


PREDICTIONS = (
    Column("all_hidden", "Cross-entropy, all hidden", "lower", "nats", lambda f: f.cross_entropy.all_hidden),
    Column(
        "truth_given", "Cross-entropy, teacher's codes given", "lower", "nats", lambda f: f.cross_entropy.truth_given
    ),
    Column("own_given", "Cross-entropy, own prediction given", "lower", "nats", lambda f: f.cross_entropy.own_given),
)


def at_step(figures: AlignmentMetrics, num_steps: int) -> StepQuality:
    """Return the metrics of reconstructions in so many decoding steps."""
    return next(step for step in figures.by_steps if step.num_steps == num_steps)


def step_column(metric: Figure, num_steps: int) -> Column:
    """Return the column of a metric of reconstructions in so many decoding steps."""
    return Column(
        f"{metric.name}@{num_steps}",
        f"{metric.label} at {steps_text(num_steps)}",
        metric.better,
        metric.unit,
        lambda figures: float(getattr(at_step(figures, num_steps), metric.name)),
    )


def columns(figures: AlignmentMetrics) -> list[Column]:
    """Return the table's columns: reconstructions in the recipe's number of decoding steps, then predictions."""
    made = [step_column(metric, headline(figures)) for metric in STEP_METRICS]
    return [*made, *PREDICTIONS]


def headline(figures: AlignmentMetrics) -> int:
    """Return the number of decoding steps that the table shows: the recipe's, or the most that were tried."""
    steps = [step.num_steps for step in figures.by_steps]
    return figures.agreement_steps if figures.agreement_steps in steps else max(steps)


def steps_text(num_steps: int) -> str:
    """Format a number of steps: 1 step, 8 steps."""
    return f"{num_steps} step{'' if num_steps == 1 else 's'}"


class Results(NamedTuple):
    """All outcomes: every arm with every seed."""

    plan: Ablation
    outcomes: Mapping[tuple[str, int], Outcome]

    def of_arm(self, name: str) -> list[Outcome]:
        """Return an arm's outcomes, seed by seed."""
        return [self.outcomes[name, seed] for seed in self.plan.seeds]

    def values(self, name: str, column: Column) -> list[float]:
        """Return a metric of an arm, seed by seed."""
        return [column.of(outcome.figures) for outcome in self.of_arm(name)]

    @property
    def names(self) -> list[str]:
        """The arms' names, in their order."""
        return [arm.name for arm in self.plan.arms]

    @property
    def sample(self) -> AlignmentMetrics:
        """Any one outcome's figures, for values that all outcomes share."""
        return next(iter(self.outcomes.values())).figures


def read_results(store: Store, plan: Ablation, refs: Mapping[tuple[str, int], ArtifactRef]) -> Results:
    """Read the results of all arms from their artifacts.

    Raises:
        ValueError: arms were not trained for as many steps, or were measured on other images.
    """
    outcomes = {(arm, seed): _outcome(store, arm, seed, ref) for (arm, seed), ref in refs.items()}
    check_equal(outcomes)
    return Results(plan, outcomes)


def check_equal(outcomes: Mapping[tuple[str, int], Outcome]) -> None:
    """Reject outcomes that cannot be compared.

    Raises:
        ValueError: two outcomes differ in training steps or held-out images; names both.
    """
    for what, told in (
        ("training steps", {name: outcome.training for name, outcome in outcomes.items()}),
        ("held-out images", {name: outcome.figures.num_images for name, outcome in outcomes.items()}),
    ):
        (first, value), *others = told.items()
        for name, other in others:
            if other != value:
                raise ValueError(
                    f"{what}: {other} of {name[0]!r}, seed {name[1]}, but {value} of {first[0]!r}, seed {first[1]}: "
                    "arms that differ so do not compare; run the ablation anew"
                )


def _outcome(store: Store, arm: str, seed: int, ref: ArtifactRef) -> Outcome:
    judged = Artifact.load(store, ref)
    training, loss, before = {}, [], 0
    refs = {"ablation_arm": ref, **{name: judged.inputs[name] for name in ("images", "teacher")}}
    for tokenizer in reversed(list(_tokenizers(judged))):
        stage = str(tokenizer.manifest.config["stage"])
        training[stage], refs[stage] = tokenizer.manifest.counts["steps"], tokenizer.ref
        loss += [LossPoint(step=before + step, loss=value) for step, value in _log(tokenizer)]
        before += training[stage]
    return Outcome(
        arm=arm,
        seed=seed,
        figures=AlignmentMetrics.model_validate_json(judged.folder.read(ARM)),
        training=training,
        loss=tuple(loss),
        refs=refs,
    )


def _tokenizers(artifact: Artifact) -> Iterator[Artifact]:
    """Yield the tokenizer that an artifact was made of, then the one that this one's training started from, and so on.

    The last training stage comes first.
    """
    while "tokenizer" in artifact.inputs:
        artifact = artifact.input("tokenizer")
        yield artifact


def _log(tokenizer: Artifact) -> list[tuple[int, float]]:
    """Return the step and loss of every logged line."""
    lines = [json.loads(line) for line in tokenizer.folder.read(LOG).decode().splitlines()]
    return [(int(line["step"]), float(line[LOSS])) for line in lines if LOSS in line]


def thinned(points: Sequence[LossPoint], bins: int) -> list[LossPoint]:
    """Return at most `bins` points: means over groups of neighbouring points, all groups of one size."""
    size = -(-len(points) // bins)
    parts = [points[at : at + size] for at in range(0, len(points), size)] if size else []
    return [LossPoint(step=part[-1].step, loss=sum(p.loss for p in part) / len(part)) for part in parts]
