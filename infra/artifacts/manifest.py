"""Manifests: identify an artifact by a plan, publish it, find it again, verify its files.

An artifact is a folder `artifacts/{kind}/{digest}` whose `manifest.json` is written last: without it the stage is not
done. A shard is done if its sidecar exists. Nothing else decides this. Very many shards are listed in pages that the
manifest names (`infra.artifacts.pages`). Readers hold an `infra.artifacts.artifact.Artifact`.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Literal

from pydantic import ConfigDict, Field, JsonValue, PositiveInt

from infra.artifacts import made_with, signing
from infra.artifacts.made_on import made_on
from infra.artifacts.pages import PAGE_ENTRIES, Page, PagedEntries, write_pages
from infra.artifacts.shards import SHARD, FileEntry, read_record
from infra.config import Config
from infra.machine import hardware
from infra.store.store import Store

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
ROOT = "artifacts"
DIGEST_CHARS = 32
CHUNK = 8 << 20  # bytes read at once
REQUESTS = 16  # at once, for the sizes of an artifact's files
Kind = Field(pattern=r"^[a-z][a-z0-9_]*$", description="what the artifact is: images, tokenizer, codes ...")
Digest = Field(pattern=rf"^[0-9a-f]{{{DIGEST_CHARS}}}$")


class ArtifactRef(Config):
    """Reference to an artifact, which one stage passes to the next."""

    kind: str = Kind
    digest: str = Digest
    uri: str = Field(description="its folder when it was published; not part of its identity")
    content_digest: str | None = Field(None, description="digest of the content, if it is made of outside data")

    @property
    def content_id(self) -> str:
        """The digest of its content if that is known, else its own: what artifacts made of this one depend on."""
        return self.content_digest or self.digest

    def __str__(self) -> str:
        return f"{self.kind}/{self.digest}"


class ArtifactPlan(Config):
    """Everything that decides an artifact's content."""

    kind: str = Kind
    version: PositiveInt = Field(description="raised by hand when the same config gives another content")
    config: dict[str, JsonValue] = Field(description="what is computed; not how or where")
    inputs: dict[str, ArtifactRef] = Field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Hash of kind, version, config and the inputs' `content_id`; never of paths."""
        parts = {
            "kind": self.kind,
            "version": self.version,
            "config": self.config,
            "inputs": {name: ref.content_id for name, ref in self.inputs.items()},
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
    files: tuple[FileEntry, ...] = Field(description="files that no page lists; `files_of` yields all")
    pages: tuple[Page, ...] = Field((), exclude_if=lambda pages: not pages, description="lists of very many shards")
    counts: dict[str, int]
    metrics: dict[str, float]
    versions: dict[str, str]
    git_revision: str | None = Field(description="of the project's own source; recorded, not hashed")
    created_at: str = Field(description="ISO 8601, UTC")
    seconds: float = Field(description="wall time of the stage")
    hardware: dict[str, str]
    made_on: tuple[dict[str, str], ...] = Field(
        (),
        exclude_if=lambda devices: not devices,  # manifests of what no device computed stay as they always were
        description="facts of the devices that computed it (infra.compute.device), in no particular order",
    )
    command: str = Field(description="command line without secrets")
    signature: str | None = Field(
        None,
        exclude_if=lambda signature: signature is None,
        description="HMAC of all the rest (infra.artifacts.signing)",
    )

    @property
    def signed_bytes(self) -> bytes:
        """The bytes that the signature covers."""
        return self.model_dump_json(exclude={"signature"}).encode()

    @property
    def num_files(self) -> int:
        """Number of the artifact's files, without pages."""
        return len(self.files) + sum(page.entries for page in self.pages)

    @property
    def num_bytes(self) -> int:
        """Size of all its files."""
        return sum(entry.size for entry in self.files) + sum(page.bytes for page in self.pages)

    @property
    def plan(self) -> ArtifactPlan:
        """The plan that the artifact was made by."""
        return ArtifactPlan(kind=self.kind, version=self.version, config=self.config, inputs=self.inputs)


def folder_of(store: Store, kind: str, digest: str) -> Store:
    """Return an artifact's folder."""
    return store.at(ROOT, kind, digest)


def find(store: Store, plan: ArtifactPlan) -> Manifest | None:
    """Read the manifest of the artifact that `plan` makes; None if it is not finished.

    Raises:
        ValueError: the manifest is damaged or another artifact's.
    """
    return read_manifest(folder_of(store, plan.kind, plan.digest))


def files_of(store: Store, manifest: Manifest) -> Iterator[FileEntry]:
    """Yield the entries of all files of an artifact, with a few pages in memory at a time.

    Raises:
        ValueError: a page is missing or damaged.
    """
    yield from manifest.files
    yield from PagedEntries(folder_of(store, manifest.kind, manifest.digest), manifest.pages)


def shards_of(store: Store, manifest: Manifest) -> Sequence[FileEntry]:
    """Return the entries of an artifact's shards; pages are read when their entries are asked for."""
    return shards_in(folder_of(store, manifest.kind, manifest.digest), manifest)


def shards_in(folder: Store, manifest: Manifest) -> Sequence[FileEntry]:
    """Return the entries of the shards of the artifact in a folder, as `shards_of`."""
    if manifest.pages:
        return PagedEntries(folder, manifest.pages)
    return [entry for entry in manifest.files if SHARD.fullmatch(entry.path)]


def key_of(made: ArtifactPlan | Manifest, entry: FileEntry) -> str:
    """Return the key in the store of an artifact's file: in its own folder, or in that of the version it came from."""
    return entry.source or f"{ROOT}/{made.kind}/{made.digest}/{entry.path}"


def manifest_of(store: Store, ref: ArtifactRef) -> Manifest:
    """Read the manifest of a finished artifact.

    Raises:
        ValueError: it is not in this store, or its manifest is damaged.
    """
    manifest = read_manifest(folder_of(store, ref.kind, ref.digest))
    if manifest is None:
        raise ValueError(f"{ref} is no finished artifact in {store.uri}; run the stage that makes it again")
    return manifest


def publish(
    store: Store,
    plan: ArtifactPlan,
    *,
    files: Sequence[FileEntry],
    counts: Mapping[str, int],
    metrics: Mapping[str, float],
    seconds: float,
    content_digest: str | None = None,
    pages: Sequence[Page] = (),
) -> Manifest:
    """Publish the artifact that `plan` makes by writing its manifest; if another run was first, return that one's.

    If there are more than `PAGE_ENTRIES` files, the shards are listed in pages. A caller that has written pages itself
    passes them, and as files those that no page lists.

    Raises:
        ValueError: a file is listed twice, is missing, or has another size than its entry says.
    """
    folder = folder_of(store, plan.kind, plan.digest)
    _check_files(store, plan, files, pages)
    listed = sorted(files, key=lambda entry: entry.path)
    if len(listed) > PAGE_ENTRIES:
        pages = [*pages, *write_pages(folder, [entry for entry in listed if SHARD.fullmatch(entry.path)])]
        listed = [entry for entry in listed if not SHARD.fullmatch(entry.path)]
    manifest = Manifest(
        kind=plan.kind,
        version=plan.version,
        config=plan.config,
        inputs=plan.inputs,
        digest=plan.digest,
        content_digest=content_digest,
        files=tuple(listed),
        pages=tuple(pages),
        counts=dict(counts),
        metrics=dict(metrics),
        versions=made_with.versions(),
        git_revision=made_with.git_revision(),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(seconds, 3),
        hardware=hardware(),
        made_on=made_on(folder),
        command=made_with.command(),
    )
    manifest = manifest.model_copy(update={"signature": signing.signature(manifest.signed_bytes)})
    if folder.create(MANIFEST, manifest.model_dump_json(indent=1).encode()):
        return manifest
    theirs = read_manifest(folder)
    if theirs is None:
        raise ValueError(f"{folder.uri}/{MANIFEST} was removed while it was published; run again")
    if _listing(theirs) != _listing(manifest):
        log.warning("%s was published by another run with other bytes; theirs is kept", folder.uri)
    return theirs


def ref_of(store: Store, manifest: Manifest) -> ArtifactRef:
    """Return the reference by which other stages name the artifact."""
    return ArtifactRef(
        kind=manifest.kind,
        digest=manifest.digest,
        uri=folder_of(store, manifest.kind, manifest.digest).uri,
        content_digest=manifest.content_digest,
    )


def verify(store: Store, manifest: Manifest) -> None:
    """Verify an artifact: read all of its files and compare them with its manifest.

    Raises:
        ValueError: a file is missing or differs.
    """
    again = f"delete {folder_of(store, manifest.kind, manifest.digest).uri} and run again"
    for entry in files_of(store, manifest):
        key = key_of(manifest, entry)
        sha256, size = hashlib.sha256(), 0
        try:
            with store.open(key) as file:
                while data := file.read(CHUNK):
                    sha256.update(data)
                    size += len(data)
        except FileNotFoundError as error:
            raise ValueError(f"{store.uri}/{key} is missing; {again}") from error
        if sha256.hexdigest() != entry.sha256:
            said = f"{size} bytes, {entry.size} expected"
            raise ValueError(f"{store.uri}/{key} is not what {MANIFEST} says ({said}); {again}")


def size_of(store: Store, key: str) -> int | None:
    """Return a file's size in bytes; None if it does not exist."""
    try:
        return store.size(key)
    except FileNotFoundError:
        return None


def _check_files(store: Store, plan: ArtifactPlan, files: Sequence[FileEntry], pages: Sequence[Page]) -> None:
    """Reject files that are listed twice or are not there as listed.

    The artifact's own shards are not checked again: their entries are their sidecars, which `write_shard` wrote after
    them. The rest are a few files, pages and shards of other artifacts, at one request each; a listing would name every
    shard.
    """
    folder = folder_of(store, plan.kind, plan.digest)
    paths = Counter([*(entry.path for entry in files), *(page.path for page in pages)])
    if twice := [path for path, count in paths.items() if count > 1]:
        raise ValueError(f"{folder.uri}: listed twice: {some(sorted(twice))}")
    others = [entry for entry in files if entry.source is not None or not SHARD.fullmatch(entry.path)]
    wanted = [(entry.source or entry.path, key_of(plan, entry), entry.size) for entry in others]
    wanted += [(page.path, f"{plan.prefix}/{page.path}", page.size) for page in pages]
    with ThreadPoolExecutor(REQUESTS) as pool:
        sizes = list(pool.map(lambda file: size_of(store, file[1]), wanted))
    if missing := sorted(name for (name, _, _), size in zip(wanted, sizes, strict=True) if size is None):
        raise ValueError(f"{folder.uri}: not written: {some(missing)}; run again")
    # An own file of another size was written by another run just now: the first manifest decides.
    referred = [(entry.source, entry.size, size) for entry, size in zip(others, sizes, strict=False) if entry.source]
    if other := sorted(source for source, size, found in referred if size != found):
        raise ValueError(f"{folder.uri}: changed since it was found: {some(other)}; run again")


def _listing(manifest: Manifest) -> list[tuple[str, str]]:
    """Return the names and hashes of all files and pages that a manifest lists."""
    files = [(entry.path, entry.sha256) for entry in manifest.files]
    return files + [(page.path, page.sha256) for page in manifest.pages]


def read_manifest(folder: Store) -> Manifest | None:
    """Read and verify the manifest in a folder; None if there is none.

    Raises:
        ValueError: it is damaged, another artifact's, or rejected because of its signature.
    """
    manifest = read_record(folder, MANIFEST, Manifest)
    if manifest is None:
        return None
    if not folder.uri.endswith(f"/{ROOT}/{manifest.kind}/{manifest.digest}"):
        raise ValueError(f"{folder.uri}/{MANIFEST} describes {manifest.kind}/{manifest.digest}; delete the folder")
    if manifest.plan.digest != manifest.digest:
        raise ValueError(f"{folder.uri}/{MANIFEST}: digest does not fit config and inputs; delete the folder")
    signing.check(manifest.signed_bytes, manifest.signature, f"{folder.uri}/{MANIFEST}")
    return manifest


def some(names: Sequence[str]) -> str:
    """Say the first ten names, and how many more there are."""
    shown = ", ".join(names[:10]) or "none"
    return f"{shown} and {len(names) - 10} more" if len(names) > 10 else shown
