"""Artifacts: what identifies them, how they are published, found and checked.

An artifact is a folder `artifacts/{kind}/{digest}` whose `manifest.json` is written last: without it the stage is not
done. A shard is done if its sidecar exists. Nothing else says so.
"""

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Literal, NamedTuple, TypeVar

from pydantic import ConfigDict, Field, JsonValue, NonNegativeInt, PositiveInt, ValidationError

from infra import provenance
from infra.config import Config
from infra.store import Store

log = logging.getLogger(__name__)

C = TypeVar("C", bound=Config)

MANIFEST = "manifest.json"
ROOT = "artifacts"
DIGEST_CHARS = 32
SHARD = re.compile(r"[a-z]+-\d{5,}-of-\d{5,}\.parquet")
REQUESTS = 16  # at once, for the sizes of an artifact's files
Kind = Field(pattern=r"^[a-z][a-z0-9_]*$", description="what the artifact is: images, tokenizer, codes ...")
Digest = Field(pattern=rf"^[0-9a-f]{{{DIGEST_CHARS}}}$")


class ArtifactRef(Config):
    """Names an artifact; what one stage hands to the next."""

    kind: str = Kind
    digest: str = Digest
    uri: str = Field(description="its folder when it was published; not part of its identity")
    content_digest: str | None = Field(None, description="digest of the content, for what is made of outside data")

    @property
    def identity(self) -> str:
        """What artifacts made of this one depend on."""
        return self.content_digest or self.digest

    def __str__(self) -> str:
        return f"{self.kind}/{self.digest}"


class FileEntry(Config):
    """A file of an artifact, which can be checked."""

    path: str = Field(description="relative to the artifact's folder")
    size: NonNegativeInt = Field(description="bytes")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    rows: NonNegativeInt | None = Field(None, description="rows of a table; None for other files")
    source: str | None = Field(
        None,
        exclude_if=lambda source: source is None,  # manifests without references stay as they always were
        description="key below the store's root of a file in another artifact's folder; None: in the own one",
    )


class Plan(Config):
    """Everything that decides an artifact's content."""

    kind: str = Kind
    version: PositiveInt = Field(description="raised by hand when the same config gives another content")
    config: dict[str, JsonValue] = Field(description="what is computed; not how or where")
    inputs: dict[str, ArtifactRef] = Field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Hash of kind, version, config and the inputs' identities; never of paths."""
        parts = {
            "kind": self.kind,
            "version": self.version,
            "config": self.config,
            "inputs": {name: ref.identity for name, ref in self.inputs.items()},
        }
        text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_CHARS]

    @property
    def prefix(self) -> str:
        """The artifact's folder below the store's root."""
        return f"{ROOT}/{self.kind}/{self.digest}"


class Manifest(Config):
    """manifest.json: its existence says that the artifact is complete."""

    model_config = ConfigDict(ser_json_inf_nan="strings")  # the best possible PSNR is infinite; JSON has no word for it

    schema_version: Literal[1] = 1
    kind: str = Kind
    version: PositiveInt
    config: dict[str, JsonValue]
    inputs: dict[str, ArtifactRef]
    digest: str = Digest
    content_digest: str | None = None
    files: tuple[FileEntry, ...]
    counts: dict[str, int]
    metrics: dict[str, float]
    versions: dict[str, str]
    git_revision: str | None = Field(description="of the project's own source; recorded, not hashed")
    created_at: str = Field(description="ISO 8601, UTC")
    seconds: float = Field(description="wall time of the stage")
    hardware: dict[str, str]
    command: str = Field(description="command line without secrets")

    @property
    def plan(self) -> Plan:
        """What the artifact was made by."""
        return Plan(kind=self.kind, version=self.version, config=self.config, inputs=self.inputs)


class Lineage(NamedTuple):
    """An artifact and, recursively, what it was made of."""

    ref: ArtifactRef
    manifest: Manifest | None
    """None if it is not in the store any more."""
    inputs: "dict[str, Lineage]"


def folder_of(store: Store, kind: str, digest: str) -> Store:
    """The folder of an artifact."""
    return store.at(ROOT, kind, digest)


def find(store: Store, plan: Plan) -> Manifest | None:
    """The manifest of what `plan` makes, or None if that is not finished.

    Raises:
        ValueError: the manifest is damaged or another artifact's.
    """
    return _read_manifest(folder_of(store, plan.kind, plan.digest))


def key_of(made: "Plan | Manifest", entry: FileEntry) -> str:
    """Where a file of an artifact is, as a key of the store: in its own folder, or in that of the one it came from."""
    return entry.source or f"{ROOT}/{made.kind}/{made.digest}/{entry.path}"


def manifest_of(store: Store, ref: ArtifactRef) -> Manifest:
    """The manifest of a finished artifact.

    Raises:
        ValueError: it is not in this store, or its manifest is damaged.
    """
    manifest = _read_manifest(folder_of(store, ref.kind, ref.digest))
    if manifest is None:
        raise ValueError(f"{ref} is no finished artifact in {store.uri}; run the stage that makes it again")
    return manifest


def publish(
    store: Store,
    plan: Plan,
    *,
    files: Sequence[FileEntry],
    counts: Mapping[str, int],
    metrics: Mapping[str, float],
    seconds: float,
    content_digest: str | None = None,
) -> Manifest:
    """Mark what `plan` makes as finished; if another run has done so, its manifest is the one that counts.

    Raises:
        ValueError: a file is listed twice, is missing, or has another size than its entry says.
    """
    folder = folder_of(store, plan.kind, plan.digest)
    _check_files(store, plan, files)
    manifest = Manifest(
        kind=plan.kind,
        version=plan.version,
        config=plan.config,
        inputs=plan.inputs,
        digest=plan.digest,
        content_digest=content_digest,
        files=tuple(sorted(files, key=lambda entry: entry.path)),
        counts=dict(counts),
        metrics=dict(metrics),
        versions=provenance.versions(),
        git_revision=provenance.git_revision(),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(seconds, 3),
        hardware=provenance.hardware(),
        command=provenance.command(),
    )
    if folder.create(MANIFEST, manifest.model_dump_json(indent=1).encode()):
        return manifest
    theirs = _read_manifest(folder)
    if theirs is None:
        raise ValueError(f"{folder.uri}/{MANIFEST} was removed while it was published; run again")
    if [(entry.path, entry.sha256) for entry in theirs.files] != [(e.path, e.sha256) for e in manifest.files]:
        log.warning("%s was published by another run with other bytes; theirs is kept", folder.uri)
    return theirs


def ref_of(store: Store, manifest: Manifest) -> ArtifactRef:
    """How other stages name the artifact."""
    return ArtifactRef(
        kind=manifest.kind,
        digest=manifest.digest,
        uri=folder_of(store, manifest.kind, manifest.digest).uri,
        content_digest=manifest.content_digest,
    )


def put(folder: Store, name: str, data: bytes, rows: int | None = None) -> FileEntry:
    """Write a file into an artifact's folder."""
    folder.write(name, data)
    return FileEntry(path=name, size=len(data), sha256=hashlib.sha256(data).hexdigest(), rows=rows)


def write_shard(folder: Store, name: str, data: bytes, rows: int) -> FileEntry:
    """Write a shard, then its sidecar; a finished shard is left as it is.

    Raises:
        ValueError: another run finished the shard with other bytes.
    """
    entry = FileEntry(path=name, size=len(data), sha256=hashlib.sha256(data).hexdigest(), rows=rows)
    done = shard_entry(folder, name)
    if done is None:
        folder.write(name, data)
        is_first = folder.create(_sidecar(name), entry.model_dump_json().encode())
        done = entry if is_first else shard_entry(folder, name)
    if done != entry:
        raise ValueError(f"{folder.uri}/{name}: two runs disagree about its content; delete the folder and run again")
    return entry


def shard_entry(folder: Store, name: str) -> FileEntry | None:
    """The entry of a finished shard, from its sidecar; None if it is not finished."""
    entry = _read(folder, _sidecar(name), FileEntry)
    if entry is not None and entry.path != name:
        raise ValueError(f"{folder.uri}/{_sidecar(name)} is the sidecar of {entry.path!r}; delete it and run again")
    return entry


def verify(store: Store, manifest: Manifest) -> None:
    """Read all files of an artifact and compare them with its manifest.

    Raises:
        ValueError: a file is missing or differs.
    """
    again = f"delete {folder_of(store, manifest.kind, manifest.digest).uri} and run again"
    for entry in manifest.files:
        key = key_of(manifest, entry)
        try:
            data = store.read(key)
        except FileNotFoundError as error:
            raise ValueError(f"{store.uri}/{key} is missing; {again}") from error
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            said = f"{len(data)} bytes, {entry.size} expected"
            raise ValueError(f"{store.uri}/{key} is not what {MANIFEST} says ({said}); {again}")


def size_of(store: Store, key: str) -> int | None:
    """Bytes in a file, None where there is none."""
    try:
        return store.size(key)
    except FileNotFoundError:
        return None


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
    found = [manifest for name in matches if (manifest := _read_manifest(root.at(name))) is not None]
    if len(found) == 1:
        return found[0]
    if found:
        listed = ", ".join(f"{m.kind}/{m.digest}" for m in found)
        raise ValueError(f"{text!r} is ambiguous in {store.uri}: {listed}; give more of the digest")
    raise ValueError(f"{text!r} is no finished artifact in {store.uri}; there are: {_some(names)}")


def lineage(store: Store, manifest: Manifest) -> Lineage:
    """The artifact with all that it was made of, as far as it is in the store."""
    seen: dict[str, Lineage] = {}

    def trace(ref: ArtifactRef, own: Manifest | None) -> Lineage:
        if str(ref) not in seen:
            inputs = own.inputs if own else {}
            below = {k: trace(r, _read_manifest(folder_of(store, r.kind, r.digest))) for k, r in inputs.items()}
            seen[str(ref)] = Lineage(ref, own, below)
        return seen[str(ref)]

    return trace(ref_of(store, manifest), manifest)


def _check_files(store: Store, plan: Plan, files: Sequence[FileEntry]) -> None:
    """Refuse what is listed twice, and files that are not there as listed.

    An own shard is not looked at again: its entry is its sidecar, which `write_shard` made after it. What is left are a
    few files and the references to other artifacts, at a request each; a listing would name every shard and sidecar.
    """
    where = folder_of(store, plan.kind, plan.digest).uri
    if twice := [path for path, count in Counter(entry.path for entry in files).items() if count > 1]:
        raise ValueError(f"{where}: listed twice: {_some(sorted(twice))}")
    others = [entry for entry in files if entry.source is not None or not SHARD.fullmatch(entry.path)]
    with ThreadPoolExecutor(REQUESTS) as pool:
        sizes = pool.map(lambda entry: size_of(store, key_of(plan, entry)), others)
        found = list(zip(others, sizes, strict=True))
    if missing := sorted(entry.source or entry.path for entry, size in found if size is None):
        raise ValueError(f"{where}: not written: {_some(missing)}; run again")
    # An own file of another size is another run's, written just now: whose manifest is first decides.
    if other := sorted(entry.source for entry, size in found if entry.source and size != entry.size):
        raise ValueError(f"{where}: changed since it was found: {_some(other)}; run again")


def _read_manifest(folder: Store) -> Manifest | None:
    manifest = _read(folder, MANIFEST, Manifest)
    if manifest is None:
        return None
    if not folder.uri.endswith(f"/{ROOT}/{manifest.kind}/{manifest.digest}"):
        raise ValueError(f"{folder.uri}/{MANIFEST} describes {manifest.kind}/{manifest.digest}; delete the folder")
    if manifest.plan.digest != manifest.digest:
        raise ValueError(f"{folder.uri}/{MANIFEST}: digest does not fit config and inputs; delete the folder")
    return manifest


def _read(folder: Store, name: str, kind: type[C]) -> C | None:
    try:
        return kind.model_validate_json(folder.read(name))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "file"
        raise ValueError(f"{folder.uri}/{name}: {where}: {first['msg']}; delete the folder and run again") from error


def _is_meant(name: str, kind: str, beginning: str) -> bool:
    own_kind, _, digest = name.partition("/")
    return bool(beginning) and kind in ("", own_kind) and digest.startswith(beginning)


def _sidecar(name: str) -> str:
    return f"{name}.json"


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:10]) or "none"
    return f"{shown} and {len(names) - 10} more" if len(names) > 10 else shown
