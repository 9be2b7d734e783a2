"""`sftok diff`: compare the codes of the same images by two tokenizers.

Memory holds one pair of shards, and a histogram per position.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from pydantic import JsonValue

from flows.store.diff.agreement import Agreement, Drift, Frequencies, Tally, drift, frequencies
from flows.store.diff.compare_rows import Dataset, pairs_of
from infra.artifacts.artifact import Artifact
from infra.artifacts.lineage import resolve, store_of
from infra.artifacts.made_on import summary
from infra.artifacts.manifest import ROOT, Manifest
from infra.artifacts.verify import read_manifest
from infra.codes.contract import load_info
from infra.progress import Progress, silent
from infra.store.store import Store

if TYPE_CHECKING:
    from rich.console import RenderableType


class CodesDiff(NamedTuple):
    """The comparison of two code datasets."""

    before: str
    after: str
    settings: dict[str, tuple[JsonValue, JsonValue]]
    """metadata that differ."""
    same_images: bool
    """whether both were made from the same bytes; otherwise an id may stand for other pixels."""
    images: dict[str, int]
    """counts: both, only_before, only_after; likewise for views."""
    views: dict[str, int]
    agreement: Agreement | None
    """None if no view is in both, or if only usage was requested."""
    frequencies: tuple[Frequencies, Frequencies]
    drift: Drift | None
    """None if the codebooks have different sizes."""
    stale: tuple[str, ...]
    """generators in this store that were trained on the codes before."""

    def as_json(self) -> dict[str, JsonValue]:
        """Return one JSON object, for scripts."""
        made: dict[str, JsonValue] = {
            "before": self.before,
            "after": self.after,
            "settings": {name: list(pair) for name, pair in self.settings.items()},
            "same_images": self.same_images,
            "images": dict(self.images),
            "views": dict(self.views),
            "agreement": None,
            "before_codes": dict(self.frequencies[0]._asdict()),
            "after_codes": dict(self.frequencies[1]._asdict()),
            "drift": dict(self.drift._asdict()) if self.drift else None,
            "stale_generators": list(self.stale),
        }
        if self.agreement:
            worst: list[JsonValue] = [{"image_id": name, "codes": share} for name, share in self.agreement.worst]
            per_position: list[JsonValue] = list(self.agreement.per_position)
            made["agreement"] = {**self.agreement._asdict(), "per_position": per_position, "worst": worst}
        return made

    def as_rich(self) -> "RenderableType":
        """Render facts, the table of before and after, and the least equal images."""
        from flows.store.diff.render import shown

        return shown(self)


def diff(
    before: str,
    after: str,
    *,
    store: str | None,
    worst: int = 10,
    usage_only: bool = False,
    progress: Progress = silent,
) -> CodesDiff:
    """Compare two code datasets, or those of two tokenizers.

    Raises:
        ValueError: there are no such datasets, or their codes cannot be compared one by one.
    """
    place = store_of(before, store)
    made = _two_manifests(place, before, after)
    old, new = (_dataset(place, manifest) for manifest in made)
    is_alike = (old.info.codebook_size, old.info.num_tokens) == (new.info.codebook_size, new.info.num_tokens)
    if not is_alike and not usage_only:
        raise ValueError(_not_alike(old, new))
    tally = Tally(old.info, new.info, worst)
    for pair in pairs_of(old, new, progress=progress):
        tally.add(pair, is_compared=not usage_only)
    settings = {
        field: (ours, theirs)
        for (field, ours), theirs in zip(old.info.as_json().items(), new.info.as_json().values(), strict=True)
        if ours != theirs
    }
    devices = summary(made[0].made_on), summary(made[1].made_on)
    if devices[0] != devices[1]:
        settings["made_on"] = devices
    return CodesDiff(
        before=old.ref,
        after=new.ref,
        settings=settings,
        same_images=old.images is not None and old.images == new.images,
        images=tally.images,
        views=tally.views,
        agreement=None if usage_only else tally.agreement(),
        frequencies=(frequencies(tally.old_NK.sum(0)), frequencies(tally.new_NK.sum(0))),
        drift=drift(tally.old_NK.sum(0), tally.new_NK.sum(0)) if is_alike else None,
        stale=tuple(_trained_on(place, old.ref)),
    )


# --- which datasets --------------------------------------------------------------------------------------------------


def _two_manifests(store: Store, before: str, after: str) -> tuple[Manifest, Manifest]:
    old, new = resolve(store, before), resolve(store, after)
    kinds = {old.kind, new.kind}
    if kinds == {"codes"}:
        return old, new
    if kinds != {"tokenizer"}:
        raise ValueError(
            f"{old.kind}/{old.digest} and {new.kind}/{new.digest} cannot be compared:"
            " name two code datasets, or two tokenizers whose code datasets are in the store"
        )
    made = {name: list(_codes_of(store, manifest)) for name, manifest in (("before", old), ("after", new))}
    alike = [(a, b) for a in made["before"] for b in made["after"] if _what(a) == _what(b)]
    if len(alike) == 1:
        return alike[0]
    if alike:
        listed = ", ".join(f"codes/{a.digest[:12]} and codes/{b.digest[:12]}" for a, b in alike)
        raise ValueError(f"these tokenizers encoded the same images more than once: name one of {listed}")
    listed = "; ".join(f"{name}: {', '.join(m.digest[:12] for m in found) or 'none'}" for name, found in made.items())
    raise ValueError(
        f"no code datasets of the same images, encoded in the same way, by both tokenizers in {store.uri} ({listed});"
        " run the encode stage with both"
    )


def _manifests(store: Store, kind: str) -> Iterator[Manifest]:
    for digest in store.at(ROOT, kind).folders():
        manifest, _ = read_manifest(store, kind, digest)
        if manifest is not None:
            yield manifest


def _codes_of(store: Store, tokenizer: Manifest) -> Iterator[Manifest]:
    for manifest in _manifests(store, "codes"):
        if "tokenizer" in manifest.inputs and manifest.inputs["tokenizer"].digest == tokenizer.digest:
            yield manifest


def _what(codes: Manifest) -> tuple[str | None, object]:
    return (codes.inputs["images"].content_id if "images" in codes.inputs else None, codes.config)


def _dataset(store: Store, manifest: Manifest) -> Dataset:
    codes = Artifact(store, manifest)
    keys = {entry.path: codes.key(entry) for entry in codes.shards()}
    if not keys:
        raise ValueError(f"{codes} has no code shards: run encode again")
    images = codes.inputs["images"].content_id if "images" in codes.inputs else None
    return Dataset(str(codes), store, keys, load_info(store, next(iter(keys.values()))), images)


def _not_alike(old: Dataset, new: Dataset) -> str:
    fields = [f for f in ("codebook_size", "num_tokens") if getattr(old.info, f) != getattr(new.info, f)]
    said = " and ".join(f"{f} is {getattr(old.info, f)} and {getattr(new.info, f)}" for f in fields)
    return (
        f"{said} in {old.ref} and {new.ref}: their codes cannot be compared one by one;"
        " usage, entropy and perplexity can: add --usage"
    )


def _trained_on(store: Store, codes: str) -> Iterator[str]:
    for manifest in _manifests(store, "generator"):
        if codes in map(str, manifest.inputs.values()):
            yield f"{manifest.kind}/{manifest.digest}"
