"""Weights that others trained: what they are for, where they come from, under what licence, and how they get here.

Nothing is downloaded unless `fetch` is asked for. A file lies in the store under its hash, `weights/{sha256}/`, where
recipes find it (`infra.artifacts.pretrained`), and `weights/names/{name}.json` says which hash a name has there.
"""

import hashlib
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pydantic import Field, JsonValue

from infra.artifacts.pretrained import WEIGHTS_ROOT
from infra.artifacts.shards import read_record
from infra.config import Config
from infra.progress import Progress, silent
from infra.store.store import Store
from sftok.config import INCEPTION_SHA256

NAMES = f"{WEIGHTS_ROOT}/names"
CHUNK = 1 << 20  # bytes
TIMEOUT = 30.0  # seconds without an answer
AGENT = {"User-Agent": "sftok"}  # some servers refuse Python's own


class Entry(NamedTuple):
    """Weights that can be used."""

    name: str
    file: str
    """what its publisher calls it."""
    use: str
    source: str
    """a URL; else who has it."""
    licence: str
    sha256: str | None
    """as known from its publisher; None where that was not published: then it is noted when the file is added."""
    setting: str
    """how a recipe names it; {sha256} stands for its hash."""
    check: Callable[[Path], None]
    """raises ValueError where the file holds other weights."""

    @property
    def is_downloadable(self) -> bool:
        """Return whether `fetch` knows a source."""
        return "://" in self.source


class Record(Config):
    """Which file a name has in a store."""

    name: str
    file: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size: int = Field(description="bytes")
    added_from: str = Field(description="the publisher's URL, or 'a local file'")


class Listed(NamedTuple):
    """A catalogue entry, and its state in the store."""

    entry: Entry
    record: Record | None
    uri: str | None

    def as_json(self) -> dict[str, JsonValue]:
        """Return one flat object."""
        entry = {key: value for key, value in self.entry._asdict().items() if key not in ("check", "setting")}
        sha256 = self.record.sha256 if self.record else self.entry.sha256
        setting = self.entry.setting.format(sha256=sha256 or "...")
        return {**entry, "sha256": sha256, "setting": setting, "in_store": self.record is not None, "uri": self.uri}


def _check_inception(path: Path) -> None:
    from sftok.weights.pickled import read_state

    state = read_state(path.read_bytes(), str(path))
    for name, shape in (("Conv2d_1a_3x3.conv.weight", (32, 3, 3, 3)), ("fc.weight", (1008, 2048))):
        found = tuple(state[name].shape) if name in state else None
        if found != shape:
            raise ValueError(f"{path}: {name} has shape {found}, Inception 2015 has {shape}: this is another network")


def _check_lpips(path: Path) -> None:
    from sftok.losses.perceptual import load_lpips

    load_lpips(path.read_bytes(), str(path))


def _check_dino(path: Path) -> None:
    from sftok.losses.dino import load_dino

    load_dino(path.read_bytes(), str(path))


def _check_teacher(path: Path) -> None:
    from sftok.weights.convert import open_published

    open_published(path, kind="teacher")


def _check_sftok(path: Path) -> None:
    from sftok.weights.convert import open_published

    open_published(path, kind="sftok")


CATALOGUE = {
    entry.name: entry
    for entry in (
        Entry(
            "inception-2015",
            "weights-inception-2015-12-05-6726825d.pth",
            "FID, IS, KID, precision and recall: the network of torch-fidelity, pytorch-fid and ADM",
            "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
            "Apache-2.0",
            INCEPTION_SHA256,
            "found by its name",
            _check_inception,
        ),
        Entry(
            "lpips-vgg16",
            "vgg16-397923af.pth",
            "LPIPS: the perceptual loss of fine_tune, and the metric (linear layers come with torchmetrics)",
            "https://download.pytorch.org/models/vgg16-397923af.pth",
            "BSD-3-Clause (torchvision)",
            "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
            "--set fine_tune.lpips.sha256={sha256}",
            _check_lpips,
        ),
        Entry(
            "dino-vits16",
            "dino_deitsmall16_pretrain.pth",
            "the features that the discriminator of fine_tune judges",
            "https://dl.fbaipublicfiles.com/dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth",
            "Apache-2.0",
            None,
            "--set fine_tune.adversarial.dino.sha256={sha256}",
            _check_dino,
        ),
        Entry(
            "maskgit-vqgan",
            "maskgit-vqgan-imagenet-f16-256.bin",
            "the teacher of the ImageNet recipes",
            "https://huggingface.co/fun-research/TiTok/resolve/main/maskgit-vqgan-imagenet-f16-256.bin",
            "Apache-2.0 (TiTok's repository)",
            None,
            "--set teacher.pretrained.sha256={sha256}",
            _check_teacher,
        ),
        Entry(
            "sftok-b",
            "pytorch_model.bin",
            "the published SFTok-B",
            "its authors (Hugging Face AndyRaoTHU/SFTok-B)",
            "none stated",
            None,
            "sftok import-weights FILE --kind sftok",
            _check_sftok,
        ),
        Entry(
            "sftok-l",
            "pytorch_model.bin",
            "the published SFTok-L",
            "its authors (Hugging Face AndyRaoTHU/SFTok-L)",
            "none stated",
            None,
            "sftok import-weights FILE --kind sftok",
            _check_sftok,
        ),
    )
}


def listed(store: str | None) -> list[Listed]:
    """List all weights that can be used, and which of them the store has."""
    place = Store.usual(store)
    found = []
    for entry in CATALOGUE.values():
        record = record_of(place, entry.name)
        uri = place.at(WEIGHTS_ROOT, record.sha256).uri + f"/{record.file}" if record else None
        found.append(Listed(entry, record, uri))
    return found


def record_of(store: Store, name: str) -> Record | None:
    """Which file a name has in a store, None where it has none."""
    return read_record(store, f"{NAMES}/{name}.json", Record)


def add(name: str, file: str, *, store: str | None, added_from: str = "a local file") -> Listed:
    """Put a file of weights into the store under its hash and its name, after checking it.

    Raises:
        ValueError: the name is unknown; there is no such file; it has another hash than its publisher says, or other
            weights; or the name has another file in this store.
    """
    entry, path = entry_of(name), Path(file).expanduser()
    if not path.is_file():
        raise ValueError(f"{path} is no file: name a copy of {entry.file}")
    with path.open("rb") as opened:
        sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
    if entry.sha256 not in (None, sha256):
        raise ValueError(
            f"{path} has sha256 {sha256}, and {entry.file} is published with {entry.sha256}: the copy is damaged or "
            "another file; get it again"
        )
    entry.check(path)
    place = Store.usual(store)
    place.check()
    record = Record(name=name, file=entry.file, sha256=sha256, size=path.stat().st_size, added_from=added_from)
    before = record_of(place, name)
    if before is not None and before.sha256 != sha256:
        raise ValueError(
            f"{name} is sha256 {before.sha256} in {place.uri} and {sha256} in {path}: one of them is not what its "
            f"publisher gave out; remove {place.uri}/{NAMES}/{name}.json to take this one"
        )
    folder = place.at(WEIGHTS_ROOT, sha256)
    folder.put_file(entry.file, path)
    place.write(f"{NAMES}/{name}.json", record.model_dump_json(indent=1).encode())
    return Listed(entry, record, f"{folder.uri}/{entry.file}")


def fetch(name: str, *, store: str | None, progress: Progress = silent) -> Listed:
    """Download a file of weights from its publisher, then `add` it.

    Raises:
        ValueError: the name is unknown, has no address, or cannot be downloaded; or as `add`.
    """
    entry = entry_of(name)
    if not entry.is_downloadable:
        raise ValueError(f"{name} has no public address: get {entry.file} from {entry.source}, then {_by_hand(entry)}")
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / entry.file
        try:
            _download(entry.source, path, progress)
        except (OSError, urllib.error.URLError) as error:
            reason = getattr(error, "reason", None) or error
            reason = getattr(reason, "strerror", None) or reason
            raise ValueError(
                f"{name}: {entry.source} cannot be downloaded ({reason}): get it elsewhere, then {_by_hand(entry)}"
            ) from error
        return add(name, str(path), store=store, added_from=entry.source)


def entry_of(name: str) -> Entry:
    """Return the entry of a name.

    Raises:
        ValueError: there is none.
    """
    if name not in CATALOGUE:
        raise ValueError(f"{name!r} is not in the catalogue of weights: choose {', '.join(CATALOGUE)}")
    return CATALOGUE[name]


def missing(name: str, store: Store) -> str:
    """Return one line with the remedy for weights that the store lacks."""
    entry = entry_of(name)
    here = f"`sftok weights fetch {name}` downloads it, or " if entry.is_downloadable else ""
    return f"the weights {name} ({entry.file}) are not in {store.uri}: {here}{_by_hand(entry)}"


def _by_hand(entry: Entry) -> str:
    return f"`sftok weights add {entry.name} FILE` puts a copy there"


def _download(url: str, path: Path, progress: Progress) -> None:
    """Write what is at `url` to `path`; a download that ends early is an error."""
    started, done = time.monotonic(), 0
    request = urllib.request.Request(url, headers=AGENT)
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer, path.open("wb") as file:
        total = int(answer.headers.get("Content-Length") or 0)
        while data := answer.read(CHUNK):
            file.write(data)
            done += len(data)
            rate = done / max(time.monotonic() - started, 1e-9) / 1e6
            progress(-(-done // CHUNK), max(-(-total // CHUNK), -(-done // CHUNK)), {"MB_per_s": rate})
    if total and done != total:
        raise OSError(0, f"it ended after {done:,} of {total:,} bytes")
