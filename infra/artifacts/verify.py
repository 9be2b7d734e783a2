"""Verify an artifact against its manifest: every byte is read again, in memory that does not grow with its size.

Each problem is a `Finding` of one line, never an exception, since a check that stops at the first problem hides the
rest. Workers check files independently; checks across files combine a small tally of each, and duplicate ids are
searched for only among shards that can hold the same hash.
"""

import hashlib
import sqlite3
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from infra.artifacts import signing
from infra.artifacts.manifest import CHUNK, MANIFEST, ROOT, Manifest, files_of, folder_of, shards_of
from infra.artifacts.shards import SHARD, FileEntry, common_divisors, shard_entry, shard_name
from infra.store.store import Store

MOST_GROUPS = 4096  # groups of shards whose ids are compared
EXAMPLES = 3  # rows named in a finding
OnRead = Callable[[int], None]  # called with the number of bytes just read
AGAIN = "delete the artifact's folder and run again"


class Finding(NamedTuple):
    """A problem and its remedy."""

    file: str
    problem: str
    remedy: str = AGAIN

    def __str__(self) -> str:
        return f"{self.file}: {self.problem}; {self.remedy}"


def locate(store: Store, text: str) -> tuple[str, str]:
    """Find the kind and digest of an artifact by a name that a person typed; its manifest may be damaged.

    Unlike `lineage.resolve`, which rejects a damaged manifest, this lets verification report the damage.

    Raises:
        ValueError: no artifact, or more than one, matches.
    """
    root = store.at(ROOT)
    name = text.strip().rstrip("/").removesuffix(f"/{MANIFEST}").removeprefix(f"{root.uri}/")
    kind, _, prefix = name.rpartition("/")
    kinds = [kind] if kind else root.folders()
    matches = [(k, digest) for k in kinds for digest in root.at(k).folders() if prefix and digest.startswith(prefix)]
    found = [match for match in matches if root.at(*match).exists(MANIFEST)]
    if len(found) == 1:
        return found[0]
    if found:
        listed = ", ".join("/".join(match) for match in found[:10])
        raise ValueError(f"{text!r} is ambiguous in {store.uri}: {listed}; give more of the digest")
    there = sorted(f"{k}/{digest}" for k in root.folders() for digest in root.at(k).folders())
    listed = f"{', '.join(there[:10]) or 'none'}{' ...' if len(there) > 10 else ''}"
    raise ValueError(f"{text!r} is no finished artifact in {store.uri}; there are: {listed}")


def read_manifest(store: Store, kind: str, digest: str) -> tuple[Manifest | None, list[Finding]]:
    """Read the manifest as far as possible, and list its problems."""
    folder = folder_of(store, kind, digest)
    try:
        manifest = Manifest.model_validate_json(folder.read(MANIFEST))
    except FileNotFoundError:
        return None, [Finding(MANIFEST, "is missing: the artifact was not finished", "run the stage that makes it")]
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "file"
        return None, [Finding(MANIFEST, f"cannot be read: {where}: {first['msg']}")]
    findings: list[Finding] = []
    if (manifest.kind, manifest.digest) != (kind, digest):
        findings.append(Finding(MANIFEST, f"describes {manifest.kind}/{manifest.digest}, not {kind}/{digest}"))
    if manifest.plan.digest != manifest.digest:
        findings.append(Finding(MANIFEST, f"config and inputs make the digest {manifest.plan.digest}, not its own"))
    try:
        signing.check(manifest.signed_bytes, manifest.signature, MANIFEST)
    except ValueError as error:
        findings.append(Finding(MANIFEST, str(error).removeprefix(f"{MANIFEST}").lstrip(": ")))
    try:
        paths = [entry.path for entry in files_of(store, manifest)]
    except ValueError as error:
        problem = str(error).rpartition(";")[0].removeprefix(f"{folder.uri}/")
        return None, [*findings, Finding(MANIFEST, f"names a page that cannot be read: {problem}")]
    findings += [Finding(path, f"is listed twice in {MANIFEST}") for path in duplicates(paths)]
    return manifest, findings


@contextmanager
def local_file(folder: Store, name: str) -> Iterator[Path]:
    """Provide the file locally: in place, or as a temporary copy, so that S3 is read once for both hash and rows."""
    if folder.is_local:
        yield folder.path / name
        return
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / "file"
        folder.get_file(name, copy)
        yield copy


def check_bytes(path: Path, entry: FileEntry, on_read: OnRead) -> Iterator[Finding]:
    """Compare size and SHA-256 with the manifest's entry."""
    sha256, size = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            while data := file.read(CHUNK):
                sha256.update(data)
                size += len(data)
                on_read(len(data))
    except FileNotFoundError:
        yield Finding(entry.path, "is missing")
        return
    if size != entry.size:
        yield Finding(entry.path, f"has {size} bytes, {MANIFEST} says {entry.size}")
    elif sha256.hexdigest() != entry.sha256:
        yield Finding(entry.path, f"its bytes differ from {MANIFEST}: SHA-256 {sha256.hexdigest()[:12]}...")


def check_sidecar(folder: Store, entry: FileEntry) -> Iterator[Finding]:
    """Compare a shard's sidecar with the manifest's entry; only this artifact's own shards have sidecars here."""
    if entry.source is not None or not SHARD.fullmatch(entry.path):
        return
    sidecar = f"{entry.path}.json"
    try:
        done = shard_entry(folder, entry.path)
    except ValueError as error:
        yield Finding(sidecar, str(error).removeprefix(f"{folder.uri}/{sidecar}: ").rpartition(";")[0])
        return
    if done is None:
        yield Finding(sidecar, f"is missing: {entry.path} does not count as finished")
    elif done != entry:
        field = next(name for name in FileEntry.model_fields if getattr(done, name) != getattr(entry, name))
        yield Finding(sidecar, f"{field} is {getattr(done, field)!r}, {MANIFEST} says {getattr(entry, field)!r}")


def check_shard_names(store: Store, manifest: Manifest) -> Iterator[Finding]:
    """Check that each split has all its shards and the folder no others, so that readers can rely on the names."""
    listed = {entry.path for entry in shards_of(store, manifest)}
    totals: dict[str, set[int]] = {}
    for name in sorted(listed):
        match = SHARD.fullmatch(name)
        assert match is not None
        totals.setdefault(match["split"], set()).add(int(match["total"]))
    for split, total in totals.items():
        if len(total) > 1:
            yield Finding(MANIFEST, f"{split} shards are numbered of {' and of '.join(map(str, sorted(total)))}")
            continue
        names = [shard_name(split, index, max(total)) for index in range(max(total))]
        yield from (Finding(name, f"is not listed in {MANIFEST}") for name in names if name not in listed)
    for name in folder_of(store, manifest.kind, manifest.digest).list():
        if SHARD.fullmatch(name) and name not in listed:
            yield Finding(name, f"lies in the folder, but {MANIFEST} does not list it", "delete this file")


def bucket_of(image_id: str, total: int) -> int:
    """Return the index of the shard of an image id: the first 8 bytes of its SHA-256, big-endian, modulo the shards.

    Deliberately a second implementation: a check that calls the code it checks would agree with any mistake.
    """
    return int.from_bytes(hashlib.sha256(image_id.encode()).digest()[:8], "big") % total


class Shard(NamedTuple):
    """A Parquet file with a column `image_id`."""

    name: str
    key: str  # below the store's root


def id_groups(shards: Sequence[Shard], *, by_hash: bool) -> list[list[Shard]]:
    """Group the shards that can share an id; if ids are placed by hash, the groups are small."""
    if not by_hash:
        return [list(shards)]
    places = [match for shard in shards if (match := SHARD.fullmatch(shard.name))]
    count = common_divisors((int(place["total"]) for place in places), MOST_GROUPS)[-1]
    groups: list[list[Shard]] = [[] for _ in range(count)]
    for shard, place in zip(shards, places, strict=True):
        groups[int(place["index"]) % count].append(shard)
    return groups


class DuplicateIdFinder:
    """Worker that finds duplicate ids in a group of shards."""

    def __init__(self, store: Store, what: str) -> None:
        self.store, self.what = store, what

    def __call__(self, shards: Sequence[Shard]) -> list[Finding]:
        """Read the id columns into a temporary index on local disk, and report duplicates."""
        index = DuplicateIndex()
        for name, key in shards:
            try:
                with self.store.open(key) as opened, pq.ParquetFile(opened, pre_buffer=False) as file:
                    for batch in file.iter_batches(columns=["image_id"]):
                        index.add(name, batch.column(0).to_pylist())
            except (FileNotFoundError, pa.ArrowInvalid):
                continue  # reported where its rows are checked
        return [Finding(", ".join(files), f"{self.what} {key!r} comes twice") for key, files in index.duplicates()]


class DuplicateIndex:
    """Index of any number of keys in a temporary file, which finds duplicates."""

    def __init__(self) -> None:
        self._db = sqlite3.connect("")  # an unnamed database is a temporary file that SQLite removes itself
        self._db.execute("create table rows (key text not null, file text not null)")

    def add(self, file: str, keys: Iterable[str]) -> None:
        """Add keys of a file."""
        self._db.executemany("insert into rows values (?, ?)", ((key, file) for key in keys))

    def duplicates(self) -> Iterator[tuple[str, list[str]]]:
        """Yield keys that were added more than once, and the files that they are in."""
        query = "select key, group_concat(distinct file) from rows group by key having count(*) > 1 order by key"
        yield from ((key, sorted(files.split(","))) for key, files in self._db.execute(query))


def duplicates(values: Iterable[str]) -> list[str]:
    """Return values that occur more than once, sorted."""
    seen: set[str] = set()
    return sorted({value for value in values if value in seen or seen.add(value)})  # type: ignore[func-returns-value]


def some(names: Iterable[object]) -> str:
    """Format the first few of the sorted names, and how many more there are."""
    listed = sorted(map(str, names))
    more = f" and {len(listed) - EXAMPLES} more" if len(listed) > EXAMPLES else ""
    return ", ".join(map(repr, listed[:EXAMPLES])) + more
