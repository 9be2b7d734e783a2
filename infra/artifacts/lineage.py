"""Find an artifact by a name that a person typed, and trace its inputs."""

from typing import NamedTuple

from infra.artifacts.artifact import Artifact
from infra.artifacts.manifest import MANIFEST, ROOT, ArtifactRef, Manifest, folder_of, read_manifest, ref_of, some
from infra.store.store import Store


class Lineage(NamedTuple):
    """An artifact and, recursively, its inputs."""

    ref: ArtifactRef
    manifest: Manifest | None
    """None if the artifact is no longer in the store."""
    inputs: "dict[str, Lineage]"


def store_of(text: str, store: str | None) -> Store:
    """Open the given store, else that of an artifact's full URI, else the default one."""
    if store is None and f"/{ROOT}/" in text:
        store = text.rpartition(f"/{ROOT}/")[0]
    return Store.usual(store)


def resolve(store: Store, text: str) -> Manifest:
    """Resolve "kind/digest", "kind/dig", "dig" (a prefix of a digest) or a full URI to an artifact.

    Raises:
        ValueError: no artifact, or more than one, matches; lists candidates.
    """
    root = store.at(ROOT)
    name = text.strip().rstrip("/").removesuffix(f"/{MANIFEST}").removeprefix(f"{root.uri}/")
    kind, _, prefix = name.rpartition("/")
    names = [f"{k}/{digest}" for k in root.folders() for digest in root.at(k).folders()]
    matches = [name for name in names if _matches(name, kind, prefix)]
    found = [manifest for name in matches if (manifest := read_manifest(root.at(name))) is not None]
    if len(found) == 1:
        return found[0]
    if found:
        listed = ", ".join(f"{m.kind}/{m.digest}" for m in found)
        raise ValueError(f"{text!r} is ambiguous in {store.uri}: {listed}; give more of the digest")
    raise ValueError(f"{text!r} is no finished artifact in {store.uri}; there are: {some(names)}")


def find_artifact(text: str, store: str | None, *kinds: str) -> Artifact:
    """Load the artifact of one of these kinds that a person means; a full URI brings its store along.

    Raises:
        ValueError: there is none, more than one, or it is of another kind.
    """
    place = store_of(text, store)
    artifact = Artifact(place, resolve(place, text))
    if artifact.manifest.kind not in kinds:
        raise ValueError(f"{text!r} is {artifact}, where a {' or a '.join(kinds)} is wanted")
    return artifact


def lineage(store: Store, manifest: Manifest) -> Lineage:
    """Trace all inputs of an artifact, as far as they are in the store."""
    seen: dict[str, Lineage] = {}

    def trace(ref: ArtifactRef, own: Manifest | None) -> Lineage:
        if str(ref) not in seen:
            inputs = own.inputs if own else {}
            below = {k: trace(r, read_manifest(folder_of(store, r.kind, r.digest))) for k, r in inputs.items()}
            seen[str(ref)] = Lineage(ref, own, below)
        return seen[str(ref)]

    return trace(ref_of(store, manifest), manifest)


def _matches(name: str, kind: str, prefix: str) -> bool:
    own_kind, _, digest = name.partition("/")
    return bool(prefix) and kind in ("", own_kind) and digest.startswith(prefix)
