"""Describe an artifact and its lineage, for people and for scripts."""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from pydantic import JsonValue

from infra.artifacts.artifact import Artifact
from infra.artifacts.inventory import key_of_ref, manifests
from infra.artifacts.lineage import Lineage, lineage, resolve, store_of
from infra.artifacts.made_on import summary
from infra.artifacts.manifest import ArtifactRef, Manifest
from infra.artifacts.shards import split_of

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.tree import Tree

    from flows.store.inventory import Dependents


class Description(NamedTuple):
    """A manifest and its lineage."""

    ref: ArtifactRef
    manifest: Manifest
    lineage: Lineage
    users: "Dependents | None" = None
    """artifacts that were made from it, if requested."""

    def as_json(self) -> dict[str, JsonValue]:
        """Return the manifest as stored, and the lineage as nested objects."""
        description: dict[str, JsonValue] = {
            "ref": str(self.ref),
            "uri": self.ref.uri,
            "manifest": json.loads(self.manifest.model_dump_json()),
            "lineage": _plain(self.lineage),
        }
        return description if self.users is None else {**description, "users": self.users.as_json()}

    def as_rich(self) -> "RenderableType":
        """Render facts, files, metrics and the tree of inputs."""
        from rich.console import Group
        from rich.text import Text
        from rich.tree import Tree

        manifest = self.manifest
        facts = {
            "uri": self.ref.uri,
            "created": f"{manifest.created_at} in {manifest.seconds:.1f} s by {manifest.command}",
            "revision": manifest.git_revision or "unknown",
            "versions": _pairs(manifest.versions),
            "hardware": _pairs(manifest.hardware),
            "made on": summary(manifest.made_on),
            "counts": _pairs(manifest.counts),
            "metrics": _pairs({name: f"{value:.4g}" for name, value in manifest.metrics.items()}),
            "files": f"{manifest.num_files:,}, {manifest.num_bytes:,} bytes",
        }
        tree = Tree(Text(str(self.ref), style="bold"))
        _grow(tree, self.lineage, set())
        shown: list[RenderableType] = [tree, *(Text(f"{name:<9} {fact}") for name, fact in facts.items() if fact)]
        if self.users is not None:
            forward = Tree(Text("used by", style="bold"))
            self.users.grow(forward)
            shown.append(forward)
        return Group(*shown)


def files_of_artifact(text: str, *, split: str | None, store: str | None) -> Iterator[str]:
    """Yield the full names of an artifact's files, or of the shards of one split, wherever in the store they are.

    Raises:
        ValueError: there is no such artifact, more than one, or it has no such split.
    """
    place = store_of(text, store)
    artifact = Artifact(place, resolve(place, text))
    found = False
    for entry in artifact.files():
        if split is None or split_of(entry.path) == split:
            found = True
            yield f"{place.uri}/{artifact.key(entry)}"
    if not found:
        splits = sorted({name for entry in artifact.files() if (name := split_of(entry.path))})
        has = f"the splits {', '.join(splits)}" if splits else "no shards"
        raise ValueError(f"{artifact} has no split {split!r}: it has {has}")


def describe(text: str, *, store: str | None, forward: bool = False) -> Description:
    """Describe the artifact that `text` names; with `forward`, include the artifacts that were made from it.

    Raises:
        ValueError: there is no such artifact, or more than one.
    """
    place = store_of(text, store)
    manifest = resolve(place, text)
    made_of = lineage(place, manifest)
    if not forward:
        return Description(made_of.ref, manifest, made_of)
    from flows.store.inventory import Dependents

    return Description(made_of.ref, manifest, made_of, Dependents(manifests(place), key_of_ref(manifest)))


def _label(node: Lineage) -> str:
    stage = node.manifest.config.get("stage") if node.manifest else None
    return f"{node.ref}{f' ({stage})' if stage else ''}{'' if node.manifest else ' (not in this store)'}"


def _grow(tree: "Tree", node: Lineage, seen: set[str]) -> None:
    """Add the inputs of `node` to a tree; the second occurrence of an artifact is not expanded."""
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
