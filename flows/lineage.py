"""An artifact and all that it was made of, for people and for scripts."""

import json
from typing import TYPE_CHECKING, NamedTuple

from pydantic import JsonValue

from infra.artifacts import ROOT, ArtifactRef, Lineage, Manifest, lineage, resolve
from infra.settings import Settings
from infra.store import Store

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.tree import Tree


class Description(NamedTuple):
    """A manifest and its lineage."""

    ref: ArtifactRef
    manifest: Manifest
    lineage: Lineage

    def as_json(self) -> dict[str, JsonValue]:
        """The manifest as it is in the store, and the lineage as nested objects."""
        return {
            "ref": str(self.ref),
            "uri": self.ref.uri,
            "manifest": json.loads(self.manifest.model_dump_json()),
            "lineage": _plain(self.lineage),
        }

    def as_rich(self) -> "RenderableType":
        """Facts, files, metrics and the tree of inputs."""
        from rich.console import Group
        from rich.text import Text
        from rich.tree import Tree

        manifest = self.manifest
        facts = {
            "uri": self.ref.uri,
            "made": f"{manifest.created_at} in {manifest.seconds:.1f} s by {manifest.command}",
            "revision": manifest.git_revision or "unknown",
            "versions": _pairs(manifest.versions),
            "hardware": _pairs(manifest.hardware),
            "counts": _pairs(manifest.counts),
            "metrics": _pairs({name: f"{value:.4g}" for name, value in manifest.metrics.items()}),
            "files": f"{len(manifest.files)}, {sum(file.size for file in manifest.files):,} bytes",
        }
        tree = Tree(Text(str(self.ref), style="bold"))
        _grow(tree, self.lineage, set())
        return Group(tree, *(Text(f"{name:<9} {fact}") for name, fact in facts.items() if fact))


def describe(text: str, *, store: str | None) -> Description:
    """What is known of the artifact that `text` names; a full URI brings its store along.

    Raises:
        ValueError: there is no such artifact, or more than one.
    """
    if store is None and f"/{ROOT}/" in text:
        store = text.rpartition(f"/{ROOT}/")[0]
    place = Store(store or Settings().store)
    manifest = resolve(place, text)
    made_of = lineage(place, manifest)
    return Description(made_of.ref, manifest, made_of)


def _label(node: Lineage) -> str:
    stage = node.manifest.config.get("stage") if node.manifest else None
    return f"{node.ref}{f' ({stage})' if stage else ''}{'' if node.manifest else ' (not in this store)'}"


def _grow(tree: "Tree", node: Lineage, seen: set[str]) -> None:
    """Add the inputs of `node`; what several artifacts stand on is unfolded once."""
    for name, below in node.inputs.items():
        again = str(below.ref) in seen and below.inputs
        seen.add(str(below.ref))
        branch = tree.add(f"{name}: {_label(below)}{' (see above)' if again else ''}")
        if not again:
            _grow(branch, below, seen)


def _plain(node: Lineage) -> JsonValue:
    inputs: dict[str, JsonValue] = {name: _plain(below) for name, below in node.inputs.items()}
    return {"ref": str(node.ref), "uri": node.ref.uri, "present": node.manifest is not None, "inputs": inputs}


def _pairs(values: dict[str, str] | dict[str, int]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
