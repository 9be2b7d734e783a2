"""The page of all runs: a single file that links to the reports of the runs beside it."""

import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from flows.report.render import duration, environment
from flows.report.script import SCRIPT, SCRIPT_HASH
from flows.runs.history import HEIGHT, WIDTH, PastRun, trends

HISTORY = "history.html"
SHOWN = (  # per run, in the table; all metrics are charted below it
    "generation.class_agreement",
    "generation.fd_random",
    "reconstruction.psnr",
    "codebook.usage_held_out",
)


def history_page(store: str, found: Sequence[PastRun], *, beside: str | None = None) -> str:
    """Render the page of all runs.

    Args:
        store: the store's URI, which is displayed.
        found: its runs, oldest first.
        beside: folder that the page is written to: links to local reports are relative to it. None: the page lies in
            the store's root, and links are relative to that.
    """
    templates = environment()
    templates.filters["duration"] = duration
    return templates.get_template("history.html.j2").render(
        store=store,
        records=list(found),
        recipes=sorted({record.recipe.name for record in found}),
        states=sorted({record.state for record in found}),
        shown=_shown(found),
        links=_links(found, beside),
        trends=trends(found),
        size=(WIDTH, HEIGHT),
        made_at=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        script=SCRIPT,
        script_hash=SCRIPT_HASH,
    )


def _shown(found: Sequence[PastRun]) -> tuple[str, ...]:
    """Select the headline metrics that some run has; per number of decoding steps, the one with the most."""
    names = {name for record in found for name in record.metrics}
    shown = []
    for wanted in SHOWN:
        steps = [name for name in names if name == wanted or name.startswith(f"{wanted}@")]
        if steps:
            shown.append(max(steps, key=lambda name: int(name.partition("@")[2] or 0)))
    return tuple(shown)


def _links(found: Sequence[PastRun], beside: str | None) -> Mapping[str, str | None]:
    links: dict[str, str | None] = {}
    for record in found:
        if record.report is None or beside is None:
            links[record.run] = record.report and f"runs/{record.run}/{record.report.rpartition('/')[2]}"
        else:
            is_local = "://" not in record.report
            links[record.run] = os.path.relpath(record.report, beside) if is_local else None
    return links
