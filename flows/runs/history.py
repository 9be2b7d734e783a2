"""Read the records of all runs of a store, and the trends of their figures."""

import json
import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from pydantic import ConfigDict, Field, ValidationError

from infra.artifacts.inventory import Key, key_of_ref
from infra.artifacts.manifest import ArtifactRef
from infra.config import Config
from infra.store.store import Store

log = logging.getLogger(__name__)

RUNS = "runs"
READERS = 16  # records read at once
WIDTH, HEIGHT, MARGIN = 220, 54, 6


class PastRecipe(Config):
    """The fields that are read of a recipe; the others change from version to version."""

    model_config = ConfigDict(extra="allow")

    name: str


class PastStage(Config):
    """The fields that are read of a stage's record."""

    model_config = ConfigDict(extra="ignore")

    state: str
    seconds: float = 0.0
    ref: ArtifactRef | None = None


class PastRun(Config):
    """The fields that are read of a run's record (`flows.runs.journal.RunRecord`), of earlier versions too."""

    model_config = ConfigDict(extra="ignore")

    run: str
    recipe: PastRecipe
    source: str = ""
    state: str
    started_at: str
    seconds: float = 0.0
    stages: dict[str, PastStage] = Field(default_factory=dict)
    metrics: dict[str, float] = Field(default_factory=dict)
    report: str | None = None
    gate: str | None = None
    reason: str | None = None
    last: str | None = None

    @property
    def is_whole(self) -> bool:
        """Whether it was a run of all stages."""
        return self.last is None and self.recipe.name != "retokenize"  # whose records did not always say more


class Dot(NamedTuple):
    """A run's figure as a point of a chart."""

    x: float
    y: float
    run: str
    value: float


class Trend(NamedTuple):
    """One figure over the runs of one recipe, oldest first."""

    recipe: str
    metric: str
    dots: tuple[Dot, ...]

    @property
    def path(self) -> str:
        """The line through the dots, as an SVG path."""
        return "M" + " L".join(f"{dot.x:g} {dot.y:g}" for dot in self.dots)

    @property
    def summary(self) -> str:
        """The chart in words."""
        values = [dot.value for dot in self.dots]
        return (
            f"{self.metric} over {len(values)} runs: first {values[0]:.4g}, last {values[-1]:.4g}, "
            f"from {min(values):.4g} to {max(values):.4g}"
        )


def records(store: Store, runs: Iterable[str] = ()) -> list[PastRun]:
    """Read the records of the named runs, or of all but those that cannot be read; oldest first.

    Raises:
        ValueError: a named run is not there, or cannot be read.
    """
    named = list(runs)
    names = named or store.at(RUNS).folders()
    with ThreadPoolExecutor(READERS) as pool:
        found = list(pool.map(lambda name: _record(store, name, is_named=bool(named)), names))
    return sorted(
        (record for record in found if record is not None), key=lambda record: (record.started_at, record.run)
    )


def keys_of(runs: Iterable[PastRun]) -> set[Key]:
    """Return the artifacts that runs made, or found made."""
    return {key_of_ref(stage.ref) for run in runs for stage in run.stages.values() if stage.ref is not None}


def latest(found: Sequence[PastRun], recipe: str | None = None) -> PastRun | None:
    """Return the last run that was completed and evaluated."""
    return next((one for one in reversed(found) if is_evaluated(one) and recipe in (None, one.recipe.name)), None)


def before(found: Sequence[PastRun], run: PastRun) -> PastRun | None:
    """Return the last good run of the same recipe before a run: completed, evaluated, not stopped by the gate."""
    earlier = [one for one in found if _age(one) < _age(run)]
    return latest([one for one in earlier if one.gate != "failed"], run.recipe.name)


def is_evaluated(record: PastRun) -> bool:
    """Return whether a run has figures."""
    return record.state == "Completed" and ref_of(record, "evaluate") is not None


def ref_of(record: PastRun, stage: str) -> ArtifactRef | None:
    """Return the artifact that a stage of a run made, or found cached."""
    return record.stages[stage].ref if stage in record.stages else None


def trends(found: Sequence[PastRun]) -> list[Trend]:
    """Return the trend of every figure that two or more runs of a recipe have."""
    made = []
    for recipe in sorted({record.recipe.name for record in found}):
        runs = [record for record in found if record.recipe.name == recipe and record.metrics]
        for metric in sorted({name for record in runs for name in record.metrics}):
            points = [(record.run, record.metrics[metric]) for record in runs if metric in record.metrics]
            if len(points) > 1:
                made.append(Trend(recipe, metric, _dots(points)))
    return made


def _age(record: PastRun) -> tuple[str, str]:
    return record.started_at, record.run


def _dots(points: Sequence[tuple[str, float]]) -> tuple[Dot, ...]:
    values = [value for _, value in points]
    low, high = min(values), max(values)
    span, step = (high - low) or 1.0, (WIDTH - 2 * MARGIN) / (len(points) - 1)
    return tuple(
        Dot(
            round(MARGIN + step * at, 2),
            round(HEIGHT - MARGIN - (value - low) / span * (HEIGHT - 2 * MARGIN) if high > low else HEIGHT / 2, 2),
            run,
            value,
        )
        for at, (run, value) in enumerate(points)
    )


def _record(store: Store, name: str, *, is_named: bool) -> PastRun | None:
    where = f"{store.uri}/{RUNS}/{name}/run.json"
    try:
        return PastRun.model_validate_json(store.read(f"{RUNS}/{name}/run.json"))
    except FileNotFoundError as error:
        if is_named:
            there = ", ".join(sorted(store.at(RUNS).folders())[-5:]) or "none"
            raise ValueError(f"there is no run {name!r} in {store.uri}; the last ones are: {there}") from error
    except (ValidationError, json.JSONDecodeError) as error:
        said = " ".join(str(error).split())[:200]
        if is_named:
            raise ValueError(f"{where} cannot be read ({said}): it is of another version, or damaged") from error
        log.warning("%s cannot be read (%s): it is left out", where, said)
    return None
