"""Verify code files: every view of every image exactly once, or classes exactly balanced.

A check handles one file at a time, in any process, and returns findings and a tally; the tallies are combined at the
end. Its memory is that of one shard.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from infra.artifacts.manifest import MANIFEST, Manifest, key_of
from infra.artifacts.shards import SHARD, FileEntry
from infra.artifacts.verify import Finding, bucket_of, some
from infra.codes.contract import NO_CLASS, CodeRows, CodesInfo, from_parquet
from infra.store.store import Store

FAILED = "failed.parquet"
FAILED_COLUMNS = ("image_id", "variant", "reason")

Key = tuple[str, str]  # image id, variant
Labels = Mapping[str, int]  # class by image id, for the images of one shard; -1: none


class CodesTally(NamedTuple):
    """Counts over one file of codes."""

    rows: int = 0
    images: int = 0
    expected: int = 0  # views that there should be
    failed: frozenset[Key] = frozenset()  # those of them that could not be encoded
    is_placed: bool = True  # every image is in the shard that its id hashes to


class SamplesTally(NamedTuple):
    """Counts over one file of samples."""

    rows: int
    classes: Counter[int]


class CodeFiles(ABC):
    """Checks common to codes and samples: files are readable, of one dataset, with the manifest's number of rows."""

    def __init__(self, manifest: Manifest, info: CodesInfo | None) -> None:
        """Take the manifest and the info of the first file, if that could be read."""
        self.manifest, self.info = manifest, info

    def read(self, entry: FileEntry, path: Path) -> Iterator[Finding | CodeRows]:
        """Yield problems of the file, then its rows if it can be read."""
        try:
            with path.open("rb") as file:
                info, rows = from_parquet(file, entry.path)
        except ValueError as error:
            problem = str(error).removeprefix(entry.path).removeprefix(":").strip()
            yield Finding(entry.path, " ".join(problem.split()))
            return
        if len(rows.image_id) != entry.rows:
            yield Finding(entry.path, f"has {len(rows.image_id)} rows, {MANIFEST} says {entry.rows}")
        if self.info is not None and info != self.info:
            ours, theirs = self.info.as_json(), info.as_json()
            for field in (field for field in ours if ours[field] != theirs[field]):
                yield Finding(entry.path, f"{field} is {theirs[field]!r}, {ours[field]!r} in the first file")
        yield rows

    @abstractmethod
    def check_info(self, name: str) -> Iterator[Finding]:
        """Compare the metadata of the first file with the manifest."""

    def check_count(self, name: str, rows: int) -> Iterator[Finding]:
        """Compare the total rows of all files with one of the manifest's counts."""
        if self.manifest.counts.get(name) != rows:
            yield Finding(MANIFEST, f"counts.{name} = {self.manifest.counts.get(name)}, the files have {rows}")


class CodesCheck(CodeFiles):
    """Check that rows + failed = images x variants, each (image id, variant) once, none missing and none foreign."""

    def __init__(self, store: Store, manifest: Manifest, info: CodesInfo | None) -> None:
        """Read the list of failed views."""
        super().__init__(manifest, info)
        self.store = store
        self.failed_findings: list[Finding] = []
        self.failed = self._read_failed(store)
        config = manifest.config.get("encode")
        encode: dict[str, Any] = config if isinstance(config, dict) else {}
        self.variants = {"train": encode.get("variants") or [], "val": encode.get("val_variants") or []}
        self.settings = {
            "tokenizer": manifest.inputs["tokenizer"].digest if "tokenizer" in manifest.inputs else None,
            "assignment": encode.get("assignment"),
            "image_size": manifest.config.get("image_size"),
        }

    def check_info(self, name: str) -> Iterator[Finding]:
        """Compare the metadata of the first file with the manifest."""
        found = self.info.as_json() if self.info else {}
        for field, expected in self.settings.items():
            if found and found[field] != expected:
                yield Finding(name, f"{field} is {found[field]!r}, {MANIFEST} says {expected!r}")

    def file(self, entry: FileEntry, path: Path, images: str | None) -> tuple[list[Finding], CodesTally]:
        """Check one file of the artifact; `images` is the key of the image shard it was made from."""
        match = SHARD.fullmatch(entry.path)
        if match is None:
            return [], CodesTally()
        labels = None if images is None else _labels(self.store, images)
        if labels is None:
            return [Finding(entry.path, "the images it was made from have no shard of this name")], CodesTally()
        variants = self.variants.get(match["split"], [])
        expected = {(image_id, variant) for image_id in labels for variant in variants}
        failed = frozenset(expected & self.failed.keys())
        findings, rows = [], 0
        for found in self.read(entry, path):
            if isinstance(found, Finding):
                findings.append(found)
            else:
                rows = len(found.image_id)
                findings += self._check_rows(entry.path, found, expected, failed)
                findings += self._check_classes(entry.path, found, labels)
        misplaced = [image_id for image_id in labels if bucket_of(image_id, int(match["total"])) != int(match["index"])]
        if misplaced:
            findings.append(Finding(entry.path, f"{len(misplaced)} images belong in another shard: {some(misplaced)}"))
        return findings, CodesTally(rows, len(labels), len(expected), failed, not misplaced)

    def end(self, tallies: Sequence[CodesTally]) -> Iterator[Finding]:
        """Yield findings that need the tallies of all files."""
        yield from self.failed_findings
        rows, expected = sum(tally.rows for tally in tallies), sum(tally.expected for tally in tallies)
        if left := self.failed.keys() - frozenset().union(*(tally.failed for tally in tallies)):
            yield Finding(FAILED, f"lists views of no image or variant of this dataset: {some(left)}")
        if rows + len(self.failed) != expected:
            yield Finding(MANIFEST, f"{rows} rows + {len(self.failed)} failed are not {expected} = images x variants")
        yield from self.check_count("rows", rows)

    def proven(self, tallies: Sequence[CodesTally]) -> list[str]:
        """State what has been proven if there are no findings."""
        images, expected = sum(tally.images for tally in tallies), sum(tally.expected for tally in tallies)
        rows = sum(tally.rows for tally in tallies)
        text = f"{images:,} images x variants = {expected:,} = {rows:,} rows + {len(self.failed):,} failed"
        codes = f"codes below {self.info.codebook_size}" if self.info else "no codes"
        return [text, f"every (image id, variant) once, none missing or foreign; classes as of the images; {codes}"]

    def _read_failed(self, store: Store) -> dict[Key, str]:
        key = next((key_of(self.manifest, entry) for entry in self.manifest.files if entry.path == FAILED), None)
        if key is None:
            return {}
        try:
            with store.open(key) as opened, pq.ParquetFile(opened) as file:
                rows = file.read(list(FAILED_COLUMNS)).to_pylist()
            failed = {(row["image_id"], row["variant"]): row["reason"] for row in rows}
        except FileNotFoundError:
            return {}  # reported where its bytes are checked
        except (pa.ArrowInvalid, KeyError) as error:
            self.failed_findings.append(Finding(FAILED, f"cannot be read: {' '.join(str(error).split())}"))
            return {}
        if len(failed) != len(rows):
            self.failed_findings.append(Finding(FAILED, f"lists {len(rows) - len(failed)} views twice"))
        return failed

    @staticmethod
    def _check_rows(name: str, rows: CodeRows, expected: set[Key], failed: frozenset[Key]) -> Iterator[Finding]:
        keys = list(zip(rows.image_id, rows.variant, strict=True))
        found = set(keys)
        if len(found) != len(keys):
            yield Finding(name, f"rows come twice: {some(key for key, n in Counter(keys).items() if n > 1)}")
        if keys != sorted(keys):
            yield Finding(name, "rows are not sorted by image id and variant")
        if foreign := found - expected:
            yield Finding(name, f"{len(foreign)} rows are of no image or variant of this shard: {some(foreign)}")
        if missing := expected - found - failed:
            yield Finding(name, f"{len(missing)} views are neither here nor in {FAILED}: {some(missing)}")
        if both := found & failed:
            yield Finding(name, f"{len(both)} views are here and in {FAILED}: {some(both)}")

    @staticmethod
    def _check_classes(name: str, rows: CodeRows, labels: Labels) -> Iterator[Finding]:
        pairs = zip(rows.image_id, rows.class_id.tolist(), strict=True)
        if other := {image_id for image_id, class_id in pairs if labels.get(image_id, class_id) != class_id}:
            yield Finding(name, f"{len(other)} images have another class here than among the images: {some(other)}")


def _labels(store: Store, key: str) -> Labels | None:
    """Read image ids and labels of an image shard, without the images themselves; None if it cannot be read."""
    try:
        with store.open(key) as opened, pq.ParquetFile(opened) as file:
            table = file.read(["image_id", "label"])
    except (FileNotFoundError, pa.ArrowInvalid):
        return None
    labels = table["label"].fill_null(NO_CLASS).to_pylist()
    return dict(zip(table["image_id"].to_pylist(), labels, strict=True))


class SamplesCheck(CodeFiles):
    """Check that every class was sampled exactly as often as requested."""

    def __init__(self, manifest: Manifest, info: CodesInfo | None) -> None:
        super().__init__(manifest, info)
        config = manifest.config.get("sample")
        self.per_class = config.get("per_class") if isinstance(config, dict) else None

    def check_info(self, name: str) -> Iterator[Finding]:
        """Compare the metadata of the first file with the manifest."""
        generator = self.manifest.inputs.get("generator")
        noted = (self.info.sampling or {}).get("generator") if self.info else None
        if self.info and (generator is None or noted != generator.digest):
            expected = generator.digest if generator else None
            yield Finding(name, f"sampling.generator is {noted!r}, {MANIFEST} says {expected!r}")

    def file(self, entry: FileEntry, path: Path, images: str | None) -> tuple[list[Finding], SamplesTally]:
        """Check one file of the artifact; samples have no images."""
        assert images is None
        findings: list[Finding] = []
        rows, classes = 0, Counter[int]()
        if SHARD.fullmatch(entry.path):
            for found in self.read(entry, path):
                if isinstance(found, Finding):
                    findings.append(found)
                else:
                    rows = len(found.image_id)
                    classes.update(found.class_id.tolist())
        return findings, SamplesTally(rows, classes)

    def end(self, tallies: Sequence[SamplesTally]) -> Iterator[Finding]:
        """Yield findings that need the tallies of all files."""
        classes = sum((tally.classes for tally in tallies), Counter[int]())
        names = (self.info.class_names if self.info else None) or ()
        chosen = self.manifest.config.get("classes")  # present unless all classes were sampled
        class_ids = chosen if isinstance(chosen, list) else list(range(len(names))) if names else [NO_CLASS]
        counts = {int(str(class_id)): classes[int(str(class_id))] for class_id in class_ids}
        off = {class_id: count for class_id, count in counts.items() if count != self.per_class}
        if off or classes.keys() - counts.keys():
            shown = some(f"{names[c] if c >= 0 else 'no class'}: {n}" for c, n in off.items())
            yield Finding(MANIFEST, f"classes are not {self.per_class} times each: {shown}")
        yield from self.check_count("samples", sum(tally.rows for tally in tallies))

    def proven(self, tallies: Sequence[SamplesTally]) -> list[str]:
        """State what has been proven if there are no findings."""
        rows, classes = sum(tally.rows for tally in tallies), len(set().union(*(tally.classes for tally in tallies)))
        return [f"{rows:,} samples, {self.per_class} of each of {classes:,} classes; no sample id twice"]
