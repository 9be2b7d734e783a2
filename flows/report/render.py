"""Render the report of a run: a self-contained HTML page, Markdown, and its data as JSON."""

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import JsonValue

from flows.report import published
from flows.report.charts import (
    HEIGHT,
    WIDTH,
    agreement_charts,
    fit_chart,
    histogram_areas,
    loss_charts,
    show,
    step_charts,
    sweep_charts,
)
from flows.report.script import SCRIPT, SCRIPT_HASH
from flows.results.types import ConfusionMatrix, EvaluationReport, ReportData
from sftok.evaluation.results import Protocol, Score

TEMPLATES = Path(__file__).parent / "templates"
MATRIX_LIMIT = 30  # classes up to which the whole confusion matrix is shown
_CONFUSED = 10  # most confused pairs shown


class Report(NamedTuple):
    """A report as HTML, Markdown and JSON."""

    html: str
    markdown: str
    json: str


class Tile(NamedTuple):
    """A headline figure, with the figures to judge it by."""

    title: str
    score: Score
    beside: tuple[tuple[str, Score], ...]


class Row(NamedTuple):
    """A row of a table of figures: one score, or one per number of decoding steps."""

    label: str
    scores: tuple[Score, ...]
    protocol: str


class ConfusionTable(NamedTuple):
    """Confusion of the class reader: counts and shares by row, recall, and the most confused pairs."""

    rows: list[list[tuple[int, float]]]
    recall: list[float]
    pairs: list[tuple[str, str, float]]


def build_report(data: ReportData) -> Report:
    """Render a run as a self-contained HTML page, Markdown, and JSON (without the pictures)."""
    view = _view(data)
    templates = _environment(data)
    return Report(
        html=templates.get_template("report.html.j2").render(view),
        markdown=templates.get_template("report.md.j2").render(view),
        json=json.dumps(data.model_dump(mode="json", exclude={"images"}), indent=1, ensure_ascii=False) + "\n",
    )


def environment() -> Environment:
    """Create the template environment: HTML is escaped, and an undefined name is an error."""
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _environment(data: ReportData) -> Environment:
    made = environment()
    made.filters.update({"show": show, "duration": duration, "md": markdown_text, "pretty": _pretty})
    made.globals["source_of"] = lambda picture: _data_uri(data.images[picture.file])
    return made


def _view(data: ReportData) -> dict[str, object]:
    report = data.evaluation
    generation = report.generation
    common = common_protocol(report.scores())
    return {
        "data": data,
        "report": report,
        "tiles": tiles(report),
        "charts": step_charts(report.reconstruction.by_steps),
        "chart_size": (WIDTH, HEIGHT),
        "areas": histogram_areas(generation.distances),
        "sweeps": sweep_charts(data.sweep),
        "losses": loss_charts(data.losses),
        "fit": fit_chart(data.fit) if data.fit else None,
        "agreement": agreement_charts(report.reconstruction.agreement) if report.reconstruction.agreement else (),
        "usage": histogram_areas(report.reconstruction.usage) if report.reconstruction.usage else (),
        "slider": [step.num_steps for step in report.reconstruction.by_steps],
        "script": SCRIPT,
        "script_hash": SCRIPT_HASH,
        "confusion": confusion_table(generation.confusion, report.class_names) if generation.confusion else None,
        "matrix_limit": MATRIX_LIMIT,
        "common": common,
        "step_rows": step_rows(report, common),
        "codebook_rows": single_rows(report.reconstruction.measures, common),
        "generation_rows": single_rows(generation.measures, common),
        "stage_names": {stage.digest: stage.name for stage in data.stages},
        "total_seconds": sum(stage.seconds for stage in data.stages),
        "published": published,
    }


def tiles(report: EvaluationReport) -> list[Tile]:
    """Select the headline figures that were measured, each with the figures to judge it by."""
    last = report.reconstruction.by_steps[-1].num_steps if report.reconstruction.by_steps else 0
    wanted = (
        ("Class agreement, samples", "generation.class_agreement",
         (("real held-out", "real.class_agreement"), ("shuffled labels", "generation.class_agreement_shuffled"))),
        ("Class agreement, reconstructions", f"reconstruction.class_agreement@{last}",
         (("real held-out", "real.class_agreement"),)),
        ("FD (random features), samples", "generation.fd_random_same_n",
         (("real held-out", "real.fd_random"),)),
        ("PSNR, reconstructions", f"reconstruction.psnr@{last}",
         (("SSIM", f"reconstruction.ssim@{last}"), ("mean image", "real.psnr_mean_image"))),
        ("Codebook usage", "codebook.usage_held_out", (("perplexity", "codebook.perplexity_held_out"),)),
        ("Samples with verbatim codes", "generation.verbatim_share", (("real held-out", "real.verbatim_share"),)),
    )  # fmt: skip
    made = []
    for title, name, beside in wanted:
        if score := report.find(name):
            found = tuple((_beside(label, score, other), other) for label, key in beside if (other := report.find(key)))
            made.append(Tile(title, score, found))
    return made


def _beside(label: str, score: Score, other: Score) -> str:
    """Add N to a label if it differs: distances at different N are not comparable."""
    n = other.protocol.num_images
    return label if n == score.protocol.num_images else f"{label} (N = {n:,})"


def confusion_table(matrix: ConfusionMatrix, class_names: Sequence[str]) -> ConfusionTable:
    """Compute shares per row, recall and the most confused pairs; a class without samples has shares of 0."""
    rows, pairs = [], []
    for intended, counts in enumerate(matrix.counts):
        total = sum(counts) or 1
        rows.append([(count, count / total) for count in counts])
        pairs += [(intended, read, n / total) for read, n in enumerate(counts) if n and read != intended]
    pairs.sort(key=lambda pair: (-pair[2], pair[0], pair[1]))
    named = [(class_names[a], class_names[b], share) for a, b, share in pairs[:_CONFUSED]]
    return ConfusionTable(rows, [row[i][1] for i, row in enumerate(rows)], named)


def single_rows(scores: Sequence[Score], common: dict[str, str]) -> list[Row]:
    """Make a row of each score."""
    return [Row(score.label, (score,), protocol_text(score.protocol, common)) for score in scores]


def step_rows(report: EvaluationReport, common: dict[str, str]) -> list[Row]:
    """Make a row of each metric with its scores by decoding steps; their protocols differ in the steps only."""
    columns = zip(*(step.measures for step in report.reconstruction.by_steps), strict=True)
    return [
        Row(column[0].label, column, protocol_text(column[0].protocol.model_copy(update={"num_steps": None}), common))
        for column in columns
    ]


def common_protocol(scores: Sequence[Score]) -> dict[str, str]:
    """Return the protocol terms that all scores which state them share, so that tables need not repeat them."""
    common = {}
    for term in ("resize", "rounding"):
        stated = {getattr(score.protocol, term) for score in scores} - {""}
        if len(stated) == 1:
            common[term] = stated.pop()
    seeds = {_seeds(score.protocol) for score in scores} - {""}
    if len(seeds) == 1:
        common["seeds"] = seeds.pop()
    return common


def protocol_text(protocol: Protocol, common: dict[str, str]) -> str:
    """Format a protocol in one line, without the common terms."""
    against = protocol.reference
    if against and protocol.num_reference is not None:
        against += f" ({protocol.num_reference:,})"
    stated = (
        ("", f"N = {protocol.num_images:,}"),
        ("against ", against),
        ("", protocol.extractor),
        ("sha256 ", protocol.extractor_sha256[:12]),
        ("", protocol.definition),
        ("decoding steps ", protocol.num_steps),
        ("decoding temperature ", protocol.temperature),
        ("sampling temperature ", protocol.sample_temperature),
        ("cfg_scale ", protocol.cfg_scale),
        ("", protocol.dtype),
        ("resize ", "" if "resize" in common else protocol.resize),
        ("rounding ", "" if "rounding" in common else protocol.rounding),
        ("seeds ", "" if "seeds" in common else _seeds(protocol)),
    )
    return " · ".join(word + _plain(value) for word, value in stated if value not in ("", None))


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _seeds(protocol: Protocol) -> str:
    return ", ".join(f"{name} {seed}" for name, seed in sorted(protocol.seeds.items()))


def duration(seconds: float) -> str:
    """Format seconds for people: 0.4 s, 12 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def markdown_text(value: object) -> str:
    """Escape text for Markdown: one line, no markup, no table borders."""
    text = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;")
    return "".join("\\" + char if char in "\\`*_[]|#~>" else char for char in text)


def _pretty(value: JsonValue) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def _data_uri(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode("ascii")
