"""Verify image Parquet: check files one by one, then combine tallies of all."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from infra.artifacts import set_hash
from infra.artifacts.manifest import MANIFEST, Manifest
from infra.artifacts.shards import SHARD, FileEntry
from infra.artifacts.verify import Finding, bucket_of, some
from sftok.images.contract import METADATA_KEY
from sftok.prepare.prepare import REJECTS

UNREADABLE = (pa.ArrowException, KeyError, TypeError, ValueError, OSError)

OF_A_SET = 2  # version of images from which on the content digest is that of a set

ClassNames = tuple[str, list[str] | None] | None  # with the file that they are from


class ImagesTally(NamedTuple):
    """Summary of one file of images."""

    split: str | None  # None: the list of rejects
    rows: int
    product: int = 1  # of the images, as in `infra.artifacts.set_hash`
    is_placed: bool = True  # every image is in the shard that its id hashes to


class ImagesCheck:
    """Checks that accepted + rejected = found, and that every image is intact, unique and in the shard of its hash."""

    def __init__(self, manifest: Manifest, class_names: ClassNames) -> None:
        """Check against a manifest, and the class names of the first shard, given with its name."""
        self.manifest, self.class_names = manifest, class_names

    def file(self, entry: FileEntry, path: Path, images: str | None = None) -> tuple[list[Finding], ImagesTally | None]:
        """Check one file of the artifact."""
        assert images is None
        match = SHARD.fullmatch(entry.path)
        if match is None and entry.path != REJECTS:
            return [], None
        try:
            findings: list[Finding] = []
            # Pre-buffered, Arrow's default, the whole shard would be in memory.
            with pq.ParquetFile(path, pre_buffer=False) as file:
                if match is None:
                    tally = ImagesTally(None, file.metadata.num_rows)
                else:
                    findings, tally = self._shard(entry.path, match, file)
        except UNREADABLE as error:
            return [Finding(entry.path, f"is no image Parquet: {' '.join(str(error).split())}")], None
        if tally.rows != entry.rows:
            findings.append(Finding(entry.path, f"has {tally.rows} rows, {MANIFEST} says {entry.rows}"))
        return findings, tally

    def end(self, tallies: Sequence[ImagesTally]) -> Iterator[Finding]:
        """Find problems that show only when all files were checked."""
        found = self._counts(tallies)
        for name, count in found.items():
            if self.manifest.counts.get(name) != count:
                yield Finding(MANIFEST, f"counts.{name} = {self.manifest.counts.get(name)}, the files have {count}")
        names = self.class_names[1] if self.class_names else None
        product = set_hash.join(tally.product for tally in tallies)
        digest = set_hash.digest(json.dumps(names).encode() + b"\n", product)
        if digest != self.manifest.content_digest and self.manifest.version >= OF_A_SET:
            yield Finding(MANIFEST, f"content_digest is {self.manifest.content_digest}, the images make {digest}")

    def proven(self, tallies: Sequence[ImagesTally]) -> list[str]:
        """State what was verified if there are no findings."""
        counts = self._counts(tallies)
        return [
            f"found {counts['found']:,} = accepted {counts['accepted']:,} + rejected {counts['rejected']:,}",
            "SHA-256 of every image's bytes; every image id once, in the shard that it hashes to"
            + (
                "; the content digest"
                if self.manifest.version >= OF_A_SET
                else "; not the content digest, once a list's"
            ),
        ]

    @staticmethod
    def _counts(tallies: Sequence[ImagesTally]) -> dict[str, int]:
        rows = Counter[str | None]()
        for tally in tallies:
            rows[tally.split] += tally.rows
        counts = {split: rows[split] for split in ("train", "val")}
        return {**counts, "accepted": rows.total() - rows[None], "rejected": rows[None], "found": rows.total()}

    def _shard(self, name: str, match: re.Match[str], file: pq.ParquetFile) -> tuple[list[Finding], ImagesTally]:
        """Check the rows of a shard, a few images at once."""
        index, total = int(match["index"]), int(match["total"])
        damaged: list[str] = []
        astray: list[str] = []
        unknown: list[str] = []
        names, product = json.loads(file.schema_arrow.metadata[METADATA_KEY])["class_names"], 1
        for batch in file.iter_batches(batch_size=16, columns=["image_id", "image.bytes", "label", "sha256"]):
            rows = batch.drop_columns("image").to_pylist()
            images = batch["image"].field("bytes")
            for row, image in zip(rows, images, strict=True):
                image_id, label = row["image_id"], row["label"]
                # A view of Arrow's memory, not a copy; an image that is null has no bytes to hash.
                if not image.is_valid or hashlib.sha256(image.as_buffer()).hexdigest() != row["sha256"]:
                    damaged.append(image_id)
                if bucket_of(image_id, total) != index:
                    astray.append(image_id)
                if label is not None and not 0 <= label < len(names or ()):
                    unknown.append(image_id)
            facts = (json.dumps([row["image_id"], row["sha256"], row["label"], match["split"]]) for row in rows)
            product = set_hash.join([product, set_hash.of_items(fact.encode() for fact in facts)])
        findings = []
        if self.class_names is not None and names != self.class_names[1]:
            findings.append(Finding(name, f"its class names are not those of {self.class_names[0]}"))
        if damaged:
            problem = f"{len(damaged)} images are not the bytes that their sha256 is of: {some(damaged)}"
            findings.append(Finding(name, problem))
        if astray:
            findings.append(Finding(name, f"{len(astray)} images belong into another shard: {some(astray)}"))
        if unknown:
            problem = f"{len(unknown)} images have a label beyond {len(names or ())} class names: {some(unknown)}"
            findings.append(Finding(name, problem))
        return findings, ImagesTally(match["split"], file.metadata.num_rows, product, not astray)
