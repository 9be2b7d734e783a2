"""`sftok verify`: read an artifact, and optionally its inputs, and compare them with their manifests."""

import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pyarrow.parquet as pq
from pydantic import JsonValue

from infra.artifacts.lineage import store_of
from infra.artifacts.manifest import MANIFEST, ArtifactRef, Manifest, files_of, folder_of, key_of, shards_of
from infra.artifacts.shards import FileEntry
from infra.artifacts.verify import (
    DuplicateIdFinder,
    Finding,
    OnRead,
    Shard,
    check_bytes,
    check_shard_names,
    check_sidecar,
    id_groups,
    local_file,
    locate,
    read_manifest,
)
from infra.codes.contract import CodesInfo, load_info
from infra.codes.verify import CodesCheck, SamplesCheck
from infra.compute.cluster import session
from infra.compute.workers import WorkerOptions, map_shards
from infra.progress import Progress, silent
from infra.store.store import Store
from sftok.images.contract import METADATA_KEY
from sftok.prepare.verify import UNREADABLE, ClassNames, ImagesCheck

MIB = 1 << 20
HERE = WorkerOptions()


class CheckResult(NamedTuple):
    """The check of one artifact."""

    ref: str
    files: int
    bytes: int
    proven: tuple[str, ...]
    findings: tuple[Finding, ...]

    def lines(self) -> Iterator[str]:
        """Yield what was proven, or a line per problem."""
        state = f"{len(self.findings)} PROBLEMS" if self.findings else "matches its manifest"
        yield f"{self.ref}: {self.files} files, {self.bytes:,} bytes: {state}"
        yield from (f"  {finding}" for finding in (self.findings or self.proven))


class Verification(NamedTuple):
    """The result of `sftok verify`."""

    store: str
    artifacts: tuple[CheckResult, ...]

    @property
    def ok(self) -> bool:
        """Return whether there are no problems."""
        return not any(artifact.findings for artifact in self.artifacts)

    def as_json(self) -> dict[str, JsonValue]:
        """Return one JSON object, for scripts."""
        return {
            "ok": self.ok,
            "store": self.store,
            "artifacts": [
                {
                    "ref": artifact.ref,
                    "files": artifact.files,
                    "bytes": artifact.bytes,
                    "proven": [] if artifact.findings else list(artifact.proven),
                    "findings": [dict(finding._asdict()) for finding in artifact.findings],
                }
                for artifact in self.artifacts
            ],
        }


class Item(NamedTuple):
    """A file to check."""

    entry: FileEntry
    images: str | None  # key of the image shard that a shard of codes was made from


class Report(NamedTuple):
    """The check of a file; without a tally if its bytes are wrong."""

    findings: list[Finding]
    tally: Any
    is_intact: bool


class ContentCheck(Protocol):
    """Check of the contents of one kind of artifact."""

    def file(self, entry: FileEntry, path: Path, images: str | None) -> tuple[list[Finding], Any]:
        """Check a file whose bytes are right; return findings and a tally."""

    def end(self, tallies: Sequence[Any]) -> Iterator[Finding]:
        """Check all files together; called only if all bytes are right."""

    def proven(self, tallies: Sequence[Any]) -> list[str]:
        """Return what is proven if there are no findings."""


def verify(
    text: str, *, store: str | None, inputs: bool = False, workers: int = 0, progress: Progress = silent
) -> Verification:
    """Check the artifact that `text` names; with `inputs`, also everything it was made from.

    Args:
        text: kind/digest, the beginning of a digest, or a full URI.
        store: the store, if `text` is not a URI.
        inputs: check all inputs too, recursively.
        workers: Ray workers; 0 checks in this process.
        progress: called after each file.

    Raises:
        ValueError: there is no such artifact, or more than one.
    """
    place = store_of(text, store)
    waiting = [locate(place, text)]
    seen = set(waiting)
    checked: list[CheckResult] = []
    options = WorkerOptions(workers=workers)
    with session() if workers else nullcontext():
        while waiting:
            kind, digest = waiting.pop(0)
            made_of, one = check_artifact(place, kind, digest, options=options, progress=progress)
            checked.append(one)
            refs = [(ref.kind, ref.digest) for ref in made_of.values()] if inputs else []
            waiting += [ref for ref in dict.fromkeys(refs) if ref not in seen]
            seen.update(refs)
    return Verification(place.uri, tuple(checked))


def check_artifact(
    store: Store, kind: str, digest: str, *, options: WorkerOptions = HERE, progress: Progress = silent
) -> tuple[Mapping[str, ArtifactRef], CheckResult]:
    """Check one artifact; return its inputs, from its manifest, and the result."""
    manifest, findings = read_manifest(store, kind, digest)
    if manifest is None:
        return {}, CheckResult(f"{kind}/{digest}", 0, 0, (), tuple(findings))
    findings += check_shard_names(store, manifest)
    make, images, cannot = _content_check(store, manifest)
    findings += cannot
    keys = {entry.path: key_of(images, entry) for entry in shards_of(store, images)} if images else {}
    items = [Item(entry, keys.get(entry.path)) for entry in files_of(store, manifest)]
    reporter = _ByteProgress(manifest.num_bytes, progress)
    by_bytes, by_files = (reporter.add_bytes, silent) if options.workers == 0 else (_ignore, reporter.set_files)
    work = functools.partial(FileCheck, store, manifest, make, by_bytes)
    reports = map_shards(work, items, options=options, progress=by_files)
    findings += [finding for report in reports for finding in report.findings]
    tallies = [report.tally for report in reports if report.tally is not None]
    proven = ["bytes and SHA-256 of every file; the digest fits config and inputs"]
    if make is not None and all(report.is_intact for report in reports):  # else sums would repeat those findings
        check = make()
        own = {entry.path: key_of(manifest, entry) for entry in shards_of(store, manifest)}
        shards = [Shard(name, keys[name] if images else key) for name, key in own.items() if not images or name in keys]
        by_hash = kind != "samples" and all(tally.is_placed for tally in tallies)
        look = functools.partial(DuplicateIdFinder, store, "sample" if kind == "samples" else "image")
        for repeated in map_shards(look, id_groups(shards, by_hash=by_hash), options=options):
            findings += repeated
        findings += check.end(tallies)
        proven += check.proven(tallies)
    return manifest.inputs, CheckResult(
        f"{kind}/{digest}", manifest.num_files, manifest.num_bytes, tuple(proven), tuple(findings)
    )


class FileCheck:
    """A worker that checks one file per call."""

    def __init__(
        self, store: Store, manifest: Manifest, make: Callable[[], ContentCheck] | None, on_read: OnRead
    ) -> None:
        """`on_read` is called with the number of bytes read, if this process reads them."""
        self.store, self.manifest, self.on_read = store, manifest, on_read
        self.folder = folder_of(store, manifest.kind, manifest.digest)
        self.content = make() if make is not None else None

    def __call__(self, item: Item) -> Report:
        """Check the bytes, and if they are right the contents."""
        findings: list[Finding] = []
        tally = None
        try:
            with local_file(self.store, key_of(self.manifest, item.entry)) as path:
                wrong = list(check_bytes(path, item.entry, self.on_read))
                if not wrong and self.content is not None:
                    findings, tally = self.content.file(item.entry, path, item.images)
        except FileNotFoundError:
            wrong = [Finding(item.entry.path, "is missing")]
        return Report([*findings, *wrong, *check_sidecar(self.folder, item.entry)], tally, not wrong)


class _ByteProgress:
    """Progress in MiB: of bytes read in this process, or estimated from the files that workers have read."""

    def __init__(self, size: int, progress: Progress) -> None:
        self.size, self.progress = size, progress
        self.started, self.done = time.monotonic(), 0

    def add_bytes(self, count: int) -> None:
        """Report that so many more bytes were read."""
        self._report(self.done + count)

    def set_files(self, done: int, total: int, figures: Mapping[str, float]) -> None:
        """Report that so many files were read."""
        del figures  # files per second
        self._report(self.size * done // total)

    def _report(self, done: int) -> None:
        self.done = done
        rate = done / max(time.monotonic() - self.started, 1e-9) / 1e6
        self.progress(-(-done // MIB), max(-(-self.size // MIB), 1), {"MB_per_s": rate})


def _ignore(count: int) -> None:
    """Ignore bytes read in another process, which cannot report them here."""
    del count


def _content_check(
    store: Store, manifest: Manifest
) -> tuple[Callable[[], ContentCheck] | None, Manifest | None, list[Finding]]:
    """Return a maker of content checks, for codes also the images that they were made from, and findings so far."""
    shards = shards_of(store, manifest)
    first = shards[0] if shards else None
    if manifest.kind == "images":
        return functools.partial(ImagesCheck, manifest, _class_names(store, manifest, first)), None, []
    if manifest.kind not in ("codes", "samples"):
        return None, None, []
    info = _codes_info(store, manifest, first)
    name = first.path if first else MANIFEST
    if manifest.kind == "samples":
        samples = functools.partial(SamplesCheck, manifest, info)
        return samples, None, list(samples().check_info(name))
    ref = manifest.inputs.get("images")
    images = read_manifest(store, ref.kind, ref.digest)[0] if ref else None
    if ref is None or images is None:
        problem = f"{ref or 'its input'} is not in this store: that no image is missing cannot be proven"
        return None, None, [Finding(MANIFEST, problem, "name the store that holds both, or run prepare again")]
    codes = functools.partial(CodesCheck, store, manifest, info)
    lacking = sorted({entry.path for entry in shards_of(store, images)} - {entry.path for entry in shards})
    findings = [Finding(name, f"is a shard of {ref} and not of the codes") for name in lacking]
    return codes, images, [*findings, *codes().check_info(name)]


def _codes_info(store: Store, manifest: Manifest, first: FileEntry | None) -> CodesInfo | None:
    """Read the metadata of the codes from the first file; None if unreadable, which the check of that file reports."""
    try:
        return load_info(store, key_of(manifest, first)) if first else None
    except (FileNotFoundError, ValueError):
        return None


def _class_names(store: Store, manifest: Manifest, first: FileEntry | None) -> ClassNames:
    """Read the first shard's class names, with its name; None if it cannot be read."""
    if first is None:
        return None
    try:
        with store.open(key_of(manifest, first)) as opened, pq.ParquetFile(opened) as file:
            return first.path, json.loads(file.schema_arrow.metadata[METADATA_KEY])["class_names"]
    except (FileNotFoundError, *UNREADABLE):
        return None
