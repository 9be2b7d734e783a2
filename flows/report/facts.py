"""Facts about a run from its artifacts: losses, held-out NLL, throughput, and rejected entries."""

from collections.abc import Mapping

import pyarrow.parquet as pq

from flows.results.health.figures import Training
from flows.results.types import GeneratorFit, LossCurve, Rejects
from infra.artifacts.artifact import Artifact
from infra.artifacts.manifest import Manifest
from sftok.prepare.prepare import REJECTS, gist

VAL_NLL = "val_nll/"  # followed by a position
POINTS = 160  # per drawn curve
REASONS = 8  # of rejection that are listed
DONE = {  # count of a stage's work, and its unit
    "images": ("accepted", "images"),
    "codes": ("rows", "rows"),
    "samples": ("samples", "samples"),
    "teacher": ("steps", "steps"),
    "tokenizer": ("steps", "steps"),
    "generator": ("steps", "steps"),
}


def loss_curves(trainings: Mapping[str, Training]) -> tuple[LossCurve, ...]:
    """Return the loss of each training, thinned out evenly."""
    curves = []
    for stage, training in trainings.items():
        rows = training.logged("loss")
        step = max(1, len(rows) // POINTS)
        kept = [*rows[::step], *([rows[-1]] if rows and (len(rows) - 1) % step else [])]
        if kept:
            steps, losses = zip(*kept, strict=True)
            curves.append(LossCurve(stage=stage, steps=steps, losses=losses))
    return tuple(curves)


def fit_of(manifest: Manifest) -> GeneratorFit | None:
    """Return the held-out NLL of a generator and of its baseline; None if its training did not measure both."""
    found = manifest.metrics
    if not {"val_nll", "val_top1", "frequency_nll"} <= found.keys():
        return None
    keys = {int(name.removeprefix(VAL_NLL)): name for name in found if name.startswith(VAL_NLL)}
    positions, model = sorted(keys), manifest.config["generator"]
    assert isinstance(model, dict)
    return GeneratorFit(
        generator=str(model["kind"]),
        nll=found["val_nll"],
        top1=found["val_top1"],
        positions=tuple(positions),
        by_position=tuple(found[keys[place]] for place in positions),
        frequency_nll=found["frequency_nll"],
        frequency_by_position=tuple(found[f"frequency_nll/{keys[place].removeprefix(VAL_NLL)}"] for place in positions),
    )


def rate_of(manifest: Manifest) -> str:
    """Return the throughput of a stage, if its counts tell; an imported model has none.

    For a training: the rate of its steps alone, and their arithmetic as a share of the device's peak (MFU).
    """
    for unit in ("images", "tokens"):
        if rate := manifest.metrics.get(f"{unit}_per_s"):
            share = manifest.metrics.get("mfu")
            return _per_second(rate, unit) + ("" if share is None else f", {100 * share:.2g} % of peak")
    name, unit = DONE.get(manifest.kind, ("", ""))
    count = manifest.counts.get(name)
    if not count or manifest.seconds <= 0:
        return ""
    return _per_second(count / manifest.seconds, unit)


def _per_second(rate: float, unit: str) -> str:
    return f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.2g} {unit}/s"


def rejects_of(images: Artifact) -> tuple[Rejects, ...]:
    """Count what prepare rejected, by reason, most frequent first."""
    if not any(entry.path == REJECTS for entry in images.manifest.files):
        return ()
    with images.folder.open(REJECTS) as opened, pq.ParquetFile(opened) as file:
        table = file.read(["path", "reason"])
    found: dict[str, tuple[int, str]] = {}
    for path, reason in zip(table["path"].to_pylist(), table["reason"].to_pylist(), strict=True):
        kind = gist(reason)
        count, example = found.get(kind, (0, path))
        found[kind] = count + 1, example
    ordered = sorted(found.items(), key=lambda item: (-item[1][0], item[0]))[:REASONS]
    return tuple(Rejects(reason=kind, count=count, example=example) for kind, (count, example) in ordered)
