"""Whether an artifact is still what its manifest says: every byte is read again, in memory that does not grow with it.

What is wrong is a `Finding`, one line each, never an exception: a check that stops at the first trouble hides the rest.
Files are checked by workers, each by itself; what has to be known across files is put together from a few numbers of
each, and an id that comes twice is looked for where ids of one hash can be.
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
from infra.artifacts.manifest import MANIFEST, ROOT, Manifest, files_of, folder_of, shards_of
from infra.artifacts.shards import SHARD, FileEntry, common_divisors, shard_entry, shard_name
from infra.store.store import Store

CHUNK = 8 << 20  # bytes read at once
MOST_GROUPS = 4096  # of shards whose ids are compared
EXAMPLES = 3  # rows named in a finding
Tick = Callable[[int], None]  # called with bytes as they are read
AGAIN = "delete the artifact's folder and run again"


class Finding(NamedTuple):
    """Something that is wrong, and what to do about it."""

    file: str
    problem: str
    remedy: str = AGAIN

    def __str__(self) -> str:
        return f"{self.file}: {self.problem}; {self.remedy}"


def locate(store: Store, text: str) -> tuple[str, str]:
    """Kind and digest of the artifact that a person means; its manifest may be damaged.

    Unlike `lineage.resolve`, which refuses a damaged manifest, so that it can be said what is wrong with it.

    Raises:
        ValueError: nothing or more than one artifact is meant.
    """
    root = store.at(ROOT)
    wanted = text.strip().rstrip("/").removesuffix(f"/{MANIFEST}").removeprefix(f"{root.uri}/")
    kind, _, beginning = wanted.rpartition("/")
    kinds = [kind] if kind else root.folders()
    named = [
        (k, digest) for k in kinds for digest in root.at(k).folders() if beginning and digest.startswith(beginning)
    ]
    found = [name for name in named if root.at(*name).exists(MANIFEST)]
    if len(found) == 1:
        return found[0]
    if found:
        listed = ", ".join("/".join(name) for name in found[:10])
        raise ValueError(f"{text!r} is ambiguous in {store.uri}: {listed}; give more of the digest")
    there = sorted(f"{k}/{digest}" for k in root.folders() for digest in root.at(k).folders())
    listed = f"{', '.join(there[:10]) or 'none'}{' ...' if len(there) > 10 else ''}"
    raise ValueError(f"{text!r} is no finished artifact in {store.uri}; there are: {listed}")


def read_manifest(store: Store, kind: str, digest: str) -> tuple[Manifest | None, list[Finding]]:
    """The manifest as far as it can be read, and what is wrong with it."""
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
        told = str(error).rpartition(";")[0].removeprefix(f"{folder.uri}/")
        return None, [*findings, Finding(MANIFEST, f"names a page that cannot be read: {told}")]
    findings += [Finding(path, f"is listed twice in {MANIFEST}") for path in twice(paths)]
    return manifest, findings


@contextmanager
def local_file(folder: Store, name: str) -> Iterator[Path]:
    """The file on this machine: where it is, or a copy that goes away, so that S3 is read once for hash and rows."""
    if folder.is_local:
        yield folder.path / name
        return
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / "file"
        folder.get_file(name, copy)
        yield copy


def check_bytes(path: Path, entry: FileEntry, tick: Tick) -> Iterator[Finding]:
    """Compare size and SHA-256 with the manifest's entry."""
    sha256, size = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            while data := file.read(CHUNK):
                sha256.update(data)
                size += len(data)
                tick(len(data))
    except FileNotFoundError:
        yield Finding(entry.path, "is missing")
        return
    if size != entry.size:
        yield Finding(entry.path, f"has {size} bytes, {MANIFEST} says {entry.size}")
    elif sha256.hexdigest() != entry.sha256:
        yield Finding(entry.path, f"other bytes than {MANIFEST} says: SHA-256 {sha256.hexdigest()[:12]}...")


def check_sidecar(folder: Store, entry: FileEntry) -> Iterator[Finding]:
    """Compare a shard's sidecar with the manifest's entry; other files, and other artifacts' shards, have none here."""
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
    """Each split has all of its shards, and the folder has none besides: readers may go by the names."""
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
    """The shard that an image id belongs to: the first 8 bytes of its SHA-256, big-endian, modulo the shards.

    Written down again, not shared with the writer: a check that calls what it checks agrees with whatever that does.
    """
    return int.from_bytes(hashlib.sha256(image_id.encode()).digest()[:8], "big") % total


class Shard(NamedTuple):
    """A Parquet file with a column `image_id`."""

    name: str
    key: str  # below the store's root


def id_groups(shards: Sequence[Shard], *, by_hash: bool) -> list[list[Shard]]:
    """Shards among which one id can come twice; where each id is in the bucket of its hash, those are few."""
    if not by_hash:
        return [list(shards)]
    places = [match for shard in shards if (match := SHARD.fullmatch(shard.name))]
    count = common_divisors((int(place["total"]) for place in places), MOST_GROUPS)[-1]
    groups: list[list[Shard]] = [[] for _ in range(count)]
    for shard, place in zip(shards, places, strict=True):
        groups[int(place["index"]) % count].append(shard)
    return groups


class RepeatedIds:
    """A worker: finds ids that come twice in a group of shards."""

    def __init__(self, store: Store, what: str) -> None:
        self.store, self.what = store, what

    def __call__(self, shards: Sequence[Shard]) -> list[Finding]:
        """Read the column of ids again; a file on this machine's disk keeps them."""
        ledger = Ledger()
        for name, key in shards:
            try:
                with self.store.open(key) as opened, pq.ParquetFile(opened, pre_buffer=False) as file:
                    for batch in file.iter_batches(columns=["image_id"]):
                        ledger.add(name, batch.column(0).to_pylist())
            except (FileNotFoundError, pa.ArrowInvalid):
                continue  # said where its rows are checked
        return [Finding(", ".join(files), f"{self.what} {key!r} comes twice") for key, files in ledger.twice()]


class Ledger:
    """Keys of any number of rows, kept in a temporary file: who comes twice."""

    def __init__(self) -> None:
        self._db = sqlite3.connect("")  # a nameless database is SQLite's own temporary file, which vanishes with it
        self._db.execute("create table rows (key text not null, file text not null)")

    def add(self, file: str, keys: Iterable[str]) -> None:
        """Note keys of a file."""
        self._db.executemany("insert into rows values (?, ?)", ((key, file) for key in keys))

    def twice(self) -> Iterator[tuple[str, list[str]]]:
        """Keys that came more than once, and the files that they are in."""
        query = "select key, group_concat(distinct file) from rows group by key having count(*) > 1 order by key"
        yield from ((key, sorted(files.split(","))) for key, files in self._db.execute(query))


def twice(values: Iterable[str]) -> list[str]:
    """Values that come more than once, sorted."""
    seen: set[str] = set()
    return sorted({value for value in values if value in seen or seen.add(value)})  # type: ignore[func-returns-value]


def some(names: Iterable[object]) -> str:
    """The first few of sorted names, and how many more."""
    listed = sorted(map(str, names))
    more = f" and {len(listed) - EXAMPLES} more" if len(listed) > EXAMPLES else ""
    return ", ".join(map(repr, listed[:EXAMPLES])) + more
