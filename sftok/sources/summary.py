"""Summarise what a source was read as: its kind, splits and classes, what is left out, and what was guessed."""

import collections

import pyarrow.compute as pc
from pydantic import Field

from infra.config import Config
from sftok.config import DataConfig
from sftok.sources.class_ids import shared_names
from sftok.sources.listing import Source, batches_of
from sftok.sources.rules import LEFT_OUT, listed

SHOWN = 5  # class names and reasons on a line
BY_HASH = "by hash"


class SourceSummary(Config):
    """What a source was read as, before any image is opened."""

    kind: str = Field(description="folder, webdataset, parquet, index or digits")
    uri: str
    files: int | None = Field(description="tar or Parquet files, whose images are known once they are read")
    images: int | None = Field(description="entries that will be read; null: in the files")
    splits: dict[str, int | None] = Field(
        description="entries, or files, of train and val; `by hash`: a hash of the image ids holds images out"
    )
    classes: int | None = Field(description="number of classes; 0: no labels; null: named in the files")
    class_names: tuple[str, ...] = Field(description=f"the first {SHOWN}, in the order of their ids")
    empty_classes: tuple[str, ...] = Field(description="classes without an entry")
    left_out: dict[str, int] = Field(description="entries that are not read, by reason")
    rejected: dict[str, int] = Field(description="entries that cannot be read, by reason, as far as is known")
    remarks: tuple[str, ...] = Field(description="what was guessed, and what it was guessed from")

    def lines(self) -> list[str]:
        """Format the summary for a terminal."""
        held = f"{self.images:,} images" if self.files is None else f"{self.files:,} files"
        parts = [f"{split} {number:,}" for split, number in self.splits.items() if number is not None]
        classes = "no labels" if self.classes == 0 else "classes are named in the files"
        if self.classes:
            classes = f"{self.classes:,} classes ({_some(self.class_names, self.classes)})"
        lines = [f"source {self.uri}: {self.kind}, {held} ({', '.join(parts)}), {classes}"]
        if count := len(self.empty_classes):
            lines.append(f"  {count:,} classes without entries: {_some(self.empty_classes, count)}")
        for name, reasons in (("left out", self.left_out), ("rejected", self.rejected)):
            if reasons:
                told = "; ".join(f"{number:,} x {reason}" for reason, number in list(reasons.items())[:SHOWN])
                lines.append(f"  {name}: {told}")
        return [*lines, *(f"  {remark}" for remark in self.remarks)]


def summarize(source: Source, config: DataConfig) -> SourceSummary:
    """Count what a listing holds; images in containers are not looked at."""
    splits, classes = collections.Counter[str](), collections.Counter[str]()
    problems = collections.Counter[str]()
    for batch in batches_of(source.entries):
        entries = batch.read()
        good = entries.table.filter(pc.is_null(entries.column("problem")))
        for counter, column in ((splits, pc.fill_null(good["split"], BY_HASH)), (classes, good["class_name"])):
            counter.update({pair["values"]: pair["counts"] for pair in pc.value_counts(column).to_pylist()})
        found = pc.value_counts(entries.column("problem")).to_pylist()
        problems.update({pair["values"]: pair["counts"] for pair in found if pair["values"] is not None})
    is_contained = bool(source.containers)
    if is_contained:
        splits = collections.Counter(container.split or BY_HASH for container in source.containers)
    names, unpack = source.class_names or (), source.unpack
    remarks = list(source.remarks)
    if BY_HASH in splits:
        whose = "no val split" if len(splits) == 1 else "entries without a split"
        remarks.append(f"{whose}: a hash of the image ids holds out {config.val_fraction:.3g} of them")
    if shared_names(names):
        remarks.append("classes of equal names are told apart by their ids")
    return SourceSummary(
        kind=source.kind,
        uri=source.uri,
        files=len(source.containers) if is_contained else None,
        images=None if is_contained else splits.total(),
        splits=dict(sorted(splits.items())),
        classes=None if not names and unpack is not None and unpack.is_labelled else len(names),
        class_names=names[:SHOWN],
        empty_classes=() if is_contained else tuple(name for name in names if not classes[name]),
        left_out={reason: count for reason, count in problems.most_common() if reason in LEFT_OUT},
        rejected={reason: count for reason, count in problems.most_common() if reason not in LEFT_OUT},
        remarks=tuple(remarks),
    )


def _some(names: tuple[str, ...], count: int) -> str:
    return listed(names[:SHOWN]) + (" ..." if count > SHOWN else "")
