"""`sftok verify`: an artifact, and what it was made of, read again and compared with what the manifests say."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import JsonValue

from infra.artifacts import MANIFEST, ArtifactRef, Manifest, files_of, folder_of, key_of, shards_of
from infra.lineage import store_of
from infra.progress import Progress, silent
from infra.shards import SHARD, FileEntry
from infra.store import Store
from infra.verify import (
    Finding,
    Ledger,
    bucket_of,
    check_bytes,
    check_shard_names,
    check_sidecar,
    local_file,
    locate,
    read_manifest,
    some,
)
from infra.verify_codes import CodesCheck, Labels, SamplesCheck
from sftok.prepare import METADATA_KEY, REJECTS

MIB = 1 << 20
NO_CLASS = -1


class Checked(NamedTuple):
    """One artifact, read again."""

    ref: str
    files: int
    bytes: int
    proven: tuple[str, ...]
    findings: tuple[Finding, ...]

    def lines(self) -> Iterator[str]:
        """What was proven, or a line for everything that is wrong."""
        state = f"{len(self.findings)} WRONG" if self.findings else "as its manifest says"
        yield f"{self.ref}: {self.files} files, {self.bytes:,} bytes: {state}"
        yield from (f"  {finding}" for finding in (self.findings or self.proven))


class Verification(NamedTuple):
    """What `sftok verify` found."""

    store: str
    artifacts: tuple[Checked, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not any(artifact.findings for artifact in self.artifacts)

    def as_json(self) -> dict[str, JsonValue]:
        """The same for scripts."""
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


class ContentCheck(Protocol):
    """What is known of the files of one kind of artifact."""

    def file(self, entry: FileEntry, path: Path) -> Iterator[Finding]:
        """Check a file whose bytes are right."""

    def end(self) -> Iterator[Finding]:
        """Check what takes all files; called only if all bytes are right."""

    def proven(self) -> list[str]:
        """What holds if there are no findings."""


def verify(text: str, *, store: str | None, inputs: bool = False, progress: Progress = silent) -> Verification:
    """Read the artifact that `text` names again, and with `inputs` all that it was made of.

    Raises:
        ValueError: there is no such artifact, or more than one.
    """
    place = store_of(text, store)
    waiting = [locate(place, text)]
    seen = set(waiting)
    checked: list[Checked] = []
    while waiting:
        kind, digest = waiting.pop(0)
        made_of, one = check_artifact(place, kind, digest, progress=progress)
        checked.append(one)
        refs = [(ref.kind, ref.digest) for ref in made_of.values()] if inputs else []
        waiting += [ref for ref in dict.fromkeys(refs) if ref not in seen]
        seen.update(refs)
    return Verification(place.uri, tuple(checked))


def check_artifact(
    store: Store, kind: str, digest: str, *, progress: Progress = silent
) -> tuple[Mapping[str, ArtifactRef], Checked]:
    """Read one artifact again; also what it was made of, as its manifest says."""
    folder = folder_of(store, kind, digest)
    manifest, findings = read_manifest(store, kind, digest)
    if manifest is None:
        return {}, Checked(f"{kind}/{digest}", 0, 0, (), tuple(findings))
    total = manifest.num_bytes
    tick = _ticker(total, progress)
    findings += check_shard_names(store, manifest)
    content, cannot = _content_check(store, manifest)
    findings += cannot
    is_intact = True
    for entry in files_of(store, manifest):
        try:
            with local_file(store, key_of(manifest, entry)) as path:
                wrong = list(check_bytes(path, entry, tick))
                if not wrong and content:
                    findings += content.file(entry, path)
        except FileNotFoundError:
            wrong = [Finding(entry.path, "is missing")]
        findings += wrong
        findings += check_sidecar(folder, entry)
        is_intact = is_intact and not wrong
    if content and is_intact:  # sums over files that are not there would only say the same again
        findings += content.end()
    proven = ["bytes and SHA-256 of every file; the digest fits config and inputs"]
    proven += content.proven() if content else []
    return manifest.inputs, Checked(f"{kind}/{digest}", manifest.num_files, total, tuple(proven), tuple(findings))


def _ticker(total: int, progress: Progress) -> Callable[[int], None]:
    """Counts bytes and reports MiB."""
    started, done = time.monotonic(), 0

    def tick(count: int) -> None:
        nonlocal done
        done += count
        rate = done / max(time.monotonic() - started, 1e-9) / 1e6
        progress(-(-done // MIB), max(-(-total // MIB), 1), {"MB_per_s": rate})

    return tick


def _content_check(store: Store, manifest: Manifest) -> tuple[ContentCheck | None, list[Finding]]:
    """What knows the files of this kind; for codes that takes the images they were made from."""
    if manifest.kind == "images":
        return ImagesCheck(manifest), []
    if manifest.kind == "samples":
        return SamplesCheck(manifest), []
    if manifest.kind != "codes":
        return None, []
    ref = manifest.inputs.get("images")
    images = read_manifest(store, ref.kind, ref.digest)[0] if ref else None
    if ref is None or images is None:
        problem = f"{ref or 'what it was made from'} is not in this store: that no image is missing cannot be proven"
        return None, [Finding(MANIFEST, problem, "name the store that holds both, or run prepare again")]
    listed = {entry.path: key_of(images, entry) for entry in shards_of(store, images)}
    check = CodesCheck(store, manifest, lambda name: _labels(store, listed[name]) if name in listed else None)
    lacking = sorted(listed.keys() - {entry.path for entry in shards_of(store, manifest)})
    return check, [Finding(name, f"is a shard of {ref} and not of the codes") for name in lacking]


def _labels(store: Store, key: str) -> Labels | None:
    """Image ids and labels of an image shard; the images themselves are not read."""
    try:
        with store.open(key) as opened, pq.ParquetFile(opened) as file:
            table = file.read(["image_id", "label"])
    except (FileNotFoundError, pa.ArrowInvalid):
        return None
    labels = table["label"].fill_null(NO_CLASS).to_pylist()
    return dict(zip(table["image_id"].to_pylist(), labels, strict=True))


class ImagesCheck:
    """accepted + rejected = found; every image whole, once, and in the shard that its id hashes to."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest, self.rejected = manifest, 0
        self.rows = {"train": 0, "val": 0}
        self.class_names: tuple[str, list[str] | None] | None = None
        self.ledger = Ledger()

    def file(self, entry: FileEntry, path: Path) -> Iterator[Finding]:
        """Check one file of the artifact."""
        match = SHARD.fullmatch(entry.path)
        if match is None and entry.path != REJECTS:
            return
        try:
            # Buffered ahead, as Arrow does by default, the whole shard would be in memory.
            with pq.ParquetFile(path, pre_buffer=False) as file:
                count = file.metadata.num_rows
                if match is None:
                    self.rejected = count
                else:
                    self.rows[match["split"]] = self.rows.get(match["split"], 0) + count
                    yield from self._check_classes(entry.path, file)
                    yield from self._check_rows(
                        entry.path, match["split"], int(match["index"]), int(match["total"]), file
                    )
        except (pa.ArrowException, KeyError, ValueError, OSError) as error:
            yield Finding(entry.path, f"is no image Parquet: {' '.join(str(error).split())}")
            return
        if count != entry.rows:
            yield Finding(entry.path, f"has {count} rows, {MANIFEST} says {entry.rows}")

    def end(self) -> Iterator[Finding]:
        """What can be told only when all files were seen."""
        for image_id, files in self.ledger.twice():
            yield Finding(", ".join(files), f"image {image_id!r} comes twice")
        accepted = sum(self.rows.values())
        found = {**self.rows, "accepted": accepted, "rejected": self.rejected, "found": accepted + self.rejected}
        for name, count in found.items():
            if self.manifest.counts.get(name) != count:
                yield Finding(MANIFEST, f"counts.{name} = {self.manifest.counts.get(name)}, the files have {count}")
        digest = self._content_digest()
        if digest != self.manifest.content_digest:
            yield Finding(MANIFEST, f"content_digest is {self.manifest.content_digest}, the images make {digest}")

    def proven(self) -> list[str]:
        """What holds if there are no findings."""
        accepted = sum(self.rows.values())
        return [
            f"found {accepted + self.rejected:,} = accepted {accepted:,} + rejected {self.rejected:,}",
            "SHA-256 of every image's bytes; every image id once, in the shard that it hashes to; the content digest",
        ]

    def _check_classes(self, name: str, file: pq.ParquetFile) -> Iterator[Finding]:
        names = json.loads(file.schema_arrow.metadata[METADATA_KEY])["class_names"]
        if self.class_names is None:
            self.class_names = name, names
        elif names != self.class_names[1]:
            yield Finding(name, f"its class names are not those of {self.class_names[0]}")

    def _check_rows(self, name: str, split: str, index: int, total: int, file: pq.ParquetFile) -> Iterator[Finding]:
        """The rows of a shard, a few images at a time."""
        damaged: list[str] = []
        astray: list[str] = []
        unknown: list[str] = []
        classes = len((self.class_names and self.class_names[1]) or ())
        for batch in file.iter_batches(batch_size=16, columns=["image_id", "image.bytes", "label", "sha256"]):
            rows = batch.drop_columns("image").to_pylist()
            images = batch["image"].field("bytes")
            for row, image in zip(rows, images, strict=True):
                image_id, label = row["image_id"], row["label"]
                # A view of Arrow's memory, not a copy; an image that is null has no bytes to be those of a hash.
                if not image.is_valid or hashlib.sha256(image.as_buffer()).hexdigest() != row["sha256"]:
                    damaged.append(image_id)
                if bucket_of(image_id, total) != index:
                    astray.append(image_id)
                if label is not None and not 0 <= label < classes:
                    unknown.append(image_id)
            facts = (json.dumps([row["image_id"], row["sha256"], row["label"], split]) for row in rows)
            self.ledger.add(name, ((row["image_id"], fact) for row, fact in zip(rows, facts, strict=True)))
        if damaged:
            yield Finding(name, f"{len(damaged)} images are not the bytes that their sha256 is of: {some(damaged)}")
        if astray:
            yield Finding(name, f"{len(astray)} images belong into another shard: {some(astray)}")
        if unknown:
            yield Finding(name, f"{len(unknown)} images have a label beyond {classes} class names: {some(unknown)}")

    def _content_digest(self) -> str:
        """The identity of the images, as prepare defines it: class names, then every image in the order of its id."""
        names = self.class_names[1] if self.class_names else None
        sha256 = hashlib.sha256(json.dumps(names).encode() + b"\n")
        for fact in self.ledger.facts():
            sha256.update(fact.encode() + b"\n")
        return sha256.hexdigest()[:32]
