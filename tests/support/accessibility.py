"""What axe, the usual checker of accessibility, finds in a page."""

from importlib.resources import files
from typing import Any

from tests.support.browser import Page

SERIOUS = ("serious", "critical")


def serious_findings(page: Page) -> list[str]:
    """Rule and element of every finding that keeps people from using the page."""
    axe = files("axe_core_python").joinpath("axe.min.js").read_text(encoding="utf-8")
    page.command("/execute/sync", {"script": axe, "args": []})
    script = "const done = arguments[0]; axe.run().then(r => done(r.violations), e => done([{id: String(e)}]));"
    violations: list[dict[str, Any]] = page.command("/execute/async", {"script": script, "args": []})
    return [
        f"{found['id']}: {node['target']} {node['html'][:120]}"
        for found in violations
        if found.get("impact", "critical") in SERIOUS
        for node in found.get("nodes", [{"target": "", "html": ""}])
    ]
