"""Finding an artifact by what a person calls it, and what it was made of."""

from typing import NamedTuple

from infra.artifacts.artifact import Artifact
from infra.artifacts.manifest import MANIFEST, ROOT, ArtifactRef, Manifest, folder_of, read_manifest, ref_of, some
from infra.settings import Settings
from infra.store.store import Store


class Lineage(NamedTuple):
    """An artifact and, recursively, what it was made of."""

    ref: ArtifactRef
    manifest: Manifest | None
    """None if it is not in the store any more."""
    inputs: "dict[str, Lineage]"


def store_of(text: str, store: str | None) -> Store:
    """The store that is meant: the given one, else that of an artifact's full URI, else the usual one."""
    if store is None and f"/{ROOT}/" in text:
        store = text.rpartition(f"/{ROOT}/")[0]
    return Store(store or Settings().store)


def resolve(store: Store, text: str) -> Manifest:
    """The artifact that a person means by "kind/digest", "kind/dig", "dig" (a beginning of a digest) or a full URI.

    Raises:
        ValueError: nothing or more than one artifact is meant; candidates are listed.
    """
    wanted = text.strip().rstrip("/")
    if wanted.endswith(f"/{MANIFEST}"):
        wanted = wanted.removesuffix(f"/{MANIFEST}")
    root = store.at(ROOT)
    if wanted.startswith(f"{root.uri}/"):
        wanted = wanted.removeprefix(f"{root.uri}/")
    kind, _, beginning = wanted.rpartition("/")
    names = [f"{k}/{digest}" for k in root.folders() for digest in root.at(k).folders()]
    matches = [name for name in names if _is_meant(name, kind, beginning)]
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
    """The artifact with all that it was made of, as far as it is in the store."""
    seen: dict[str, Lineage] = {}

    def trace(ref: ArtifactRef, own: Manifest | None) -> Lineage:
        if str(ref) not in seen:
            inputs = own.inputs if own else {}
            below = {k: trace(r, read_manifest(folder_of(store, r.kind, r.digest))) for k, r in inputs.items()}
            seen[str(ref)] = Lineage(ref, own, below)
        return seen[str(ref)]

    return trace(ref_of(store, manifest), manifest)


def _is_meant(name: str, kind: str, beginning: str) -> bool:
    own_kind, _, digest = name.partition("/")
    return bool(beginning) and kind in ("", own_kind) and digest.startswith(beginning)
