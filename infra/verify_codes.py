"""Whether code files hold what they should: every view of every image once, or classes exactly balanced.

A check is fed the files of an artifact one at a time and keeps what has to be known across them: counts, and a ledger
on disk. Its memory is that of a shard.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra.artifacts import MANIFEST, Manifest, key_of
from infra.codes import CodeRows, CodesInfo, from_parquet
from infra.shards import SHARD, FileEntry
from infra.store import Store
from infra.verify import Finding, Ledger, some

FAILED = "failed.parquet"
FAILED_COLUMNS = ("image_id", "variant", "reason")

Key = tuple[str, str]  # image id, variant
Labels = Mapping[str, int]  # of the images of one shard, -1: none


class CodeFiles(ABC):
    """What codes and samples have in common: readable files of one dataset, with the rows that the manifest says."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest, self.rows = manifest, 0
        self.info: CodesInfo | None = None
        self.ledger = Ledger()

    def read(self, entry: FileEntry, path: Path) -> Iterator[Finding | CodeRows]:
        """The file's rows, unless it cannot be read, and what is wrong with it as a file."""
        try:
            with path.open("rb") as file:
                info, rows = from_parquet(file, entry.path)
        except ValueError as error:
            problem = str(error).removeprefix(entry.path).removeprefix(":").strip()
            yield Finding(entry.path, " ".join(problem.split()))
            return
        self.rows += len(rows.image_id)
        if len(rows.image_id) != entry.rows:
            yield Finding(entry.path, f"has {len(rows.image_id)} rows, {MANIFEST} says {entry.rows}")
        if self.info is None:
            self.info = info
            yield from self.check_info(entry, info)
        elif info != self.info:
            ours, theirs = self.info.as_json(), info.as_json()
            for field in (field for field in ours if ours[field] != theirs[field]):
                yield Finding(entry.path, f"{field} is {theirs[field]!r}, {ours[field]!r} in the files before it")
        yield rows

    @abstractmethod
    def check_info(self, entry: FileEntry, info: CodesInfo) -> Iterator[Finding]:
        """Compare the metadata with the manifest."""

    def check_count(self, name: str) -> Iterator[Finding]:
        """Compare the rows of all files with a count of the manifest."""
        if self.manifest.counts.get(name) != self.rows:
            yield Finding(MANIFEST, f"counts.{name} = {self.manifest.counts.get(name)}, the files have {self.rows}")


class CodesCheck(CodeFiles):
    """rows + failed = images x variants, each (image id, variant) once, none missing and none of another image."""

    def __init__(self, store: Store, manifest: Manifest, labels_of: Callable[[str], Labels | None]) -> None:
        """Read the list of failed views; `labels_of` gives the images of an image shard, None where there is none."""
        super().__init__(manifest)
        self.labels_of, self.expected, self.images = labels_of, 0, 0
        self.shards: set[str] = set()
        self.trouble: list[Finding] = []
        self.failed = self._read_failed(store)
        self.failed_left = dict(self.failed)
        config = manifest.config.get("encode")
        encode: dict[str, Any] = config if isinstance(config, dict) else {}
        self.variants = {"train": encode.get("variants") or [], "val": encode.get("val_variants") or []}
        self.settings = {
            "tokenizer": manifest.inputs["tokenizer"].digest if "tokenizer" in manifest.inputs else None,
            "assignment": encode.get("assignment"),
            "image_size": manifest.config.get("image_size"),
        }

    def check_info(self, entry: FileEntry, info: CodesInfo) -> Iterator[Finding]:
        """Compare the metadata with the manifest."""
        found = info.as_json()
        for field, expected in self.settings.items():
            if found[field] != expected:
                yield Finding(entry.path, f"{field} is {found[field]!r}, {MANIFEST} says {expected!r}")

    def file(self, entry: FileEntry, path: Path) -> Iterator[Finding]:
        """Check one file of the artifact."""
        match = SHARD.fullmatch(entry.path)
        if match is None:
            return
        self.shards.add(entry.path)
        labels = self.labels_of(entry.path)
        if labels is None:
            yield Finding(entry.path, "the images it was made from have no shard of this name")
            return
        variants = self.variants.get(match["split"], [])
        self.images += len(labels)
        self.expected += len(labels) * len(variants)
        expected = {(image_id, variant) for image_id in labels for variant in variants}
        failed = expected & self.failed_left.keys()
        for key in failed:
            del self.failed_left[key]
        for found in self.read(entry, path):
            if isinstance(found, Finding):
                yield found
            else:
                yield from self._check_rows(entry.path, found, expected, failed)
                yield from self._check_classes(entry.path, found, labels)
        self.ledger.add(entry.path, ((image_id, "") for image_id in labels))

    def end(self) -> Iterator[Finding]:
        """What can be told only when all files were seen."""
        yield from self.trouble
        for image_id, files in self.ledger.twice():
            yield Finding(", ".join(files), f"image {image_id!r} comes twice")
        if self.failed_left:
            yield Finding(FAILED, f"lists views of no image or variant of this dataset: {some(self.failed_left)}")
        if self.rows + len(self.failed) != self.expected:
            yield Finding(
                MANIFEST, f"{self.rows} rows + {len(self.failed)} failed are not {self.expected} = images x variants"
            )
        yield from self.check_count("rows")

    def proven(self) -> list[str]:
        """What holds if there are no findings."""
        text = (
            f"{self.images:,} images x variants = {self.expected:,} = {self.rows:,} rows + {len(self.failed):,} failed"
        )
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
            return {}  # said where its bytes are checked
        except (pa.ArrowInvalid, KeyError) as error:
            self.trouble.append(Finding(FAILED, f"cannot be read: {' '.join(str(error).split())}"))
            return {}
        if len(failed) != len(rows):
            self.trouble.append(Finding(FAILED, f"lists {len(rows) - len(failed)} views twice"))
        return failed

    @staticmethod
    def _check_rows(name: str, rows: CodeRows, expected: set[Key], failed: set[Key]) -> Iterator[Finding]:
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


class SamplesCheck(CodeFiles):
    """Every class exactly as often as asked for, no sample id twice."""

    def __init__(self, manifest: Manifest) -> None:
        super().__init__(manifest)
        self.classes: Counter[int] = Counter()
        config = manifest.config.get("sample")
        self.per_class = config.get("per_class") if isinstance(config, dict) else None

    def check_info(self, entry: FileEntry, info: CodesInfo) -> Iterator[Finding]:
        """Compare the metadata with the manifest."""
        generator = self.manifest.inputs.get("generator")
        noted = (info.sampling or {}).get("generator")
        if generator is None or noted != generator.digest:
            expected = generator.digest if generator else None
            yield Finding(entry.path, f"sampling.generator is {noted!r}, {MANIFEST} says {expected!r}")

    def file(self, entry: FileEntry, path: Path) -> Iterator[Finding]:
        """Check one file of the artifact."""
        if not SHARD.fullmatch(entry.path):
            return
        for found in self.read(entry, path):
            if isinstance(found, Finding):
                yield found
            else:
                self.classes.update(found.class_id.tolist())
                self.ledger.add(entry.path, ((sample_id, "") for sample_id in found.image_id))

    def end(self) -> Iterator[Finding]:
        """What can be told only when all files were seen."""
        for sample_id, files in self.ledger.twice():
            yield Finding(", ".join(files), f"sample {sample_id!r} comes twice")
        names = (self.info.class_names if self.info else None) or ()
        drawn = self.manifest.config.get("classes")  # stated where they are not all
        wanted = drawn if isinstance(drawn, list) else list(range(len(names))) if names else [-1]
        counts = {int(str(class_id)): self.classes[int(str(class_id))] for class_id in wanted}
        off = {class_id: count for class_id, count in counts.items() if count != self.per_class}
        if off or self.classes.keys() - counts.keys():
            shown = some(f"{names[c] if c >= 0 else 'no class'}: {n}" for c, n in off.items())
            yield Finding(MANIFEST, f"classes are not {self.per_class} times each: {shown}")
        yield from self.check_count("samples")

    def proven(self) -> list[str]:
        """What holds if there are no findings."""
        return [f"{self.rows:,} samples, {self.per_class} of each of {len(self.classes):,} classes; no sample id twice"]
