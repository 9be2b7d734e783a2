"""Pretrained weights match their hash, or the error states the remedy."""

import hashlib
from pathlib import Path

import pytest

from infra.artifacts.pretrained import PretrainedConfig, read_pretrained
from infra.store.store import Store

DATA, OTHER = b"weights", b"others"
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "weights folder"
    folder.mkdir()
    (folder / "a.bin").write_bytes(OTHER)
    (folder / "vgg.bin").write_bytes(DATA)
    return folder


def read(store: Store, uri: str, sha256: str = SHA256) -> bytes:
    return read_pretrained(PretrainedConfig(uri=uri, sha256=sha256), store, "LPIPS")


def test_a_file_and_a_folder(folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(store, str(folder / "vgg.bin")) == DATA
    assert read(store, (folder / "vgg.bin").as_uri()) == DATA
    assert read(store, (folder / "vgg.bin").as_uri().replace("%20", " ")) == DATA
    (folder / "b.bin").symlink_to("nowhere")
    assert read(store, str(folder)) == DATA
    monkeypatch.chdir(folder)
    assert read(store, "vgg.bin") == DATA
    assert read(store, ".") == DATA


def test_the_stores_own(store: Store) -> None:
    store.at("weights", SHA256).write("vgg.bin", DATA)
    assert read(store, "") == DATA


@pytest.mark.s3
def test_on_s3(s3_store: Store, store: Store) -> None:
    s3_store.at("w").write("vgg.bin", DATA)
    assert read(store, f"{s3_store.uri}/w/vgg.bin") == DATA
    assert read(store, f"{s3_store.uri}/w") == DATA


def test_another_file_is_refused_by_name_and_hash(folder: Path, store: Store) -> None:
    with pytest.raises(ValueError, match=rf"LPIPS: .*a\.bin has sha256 {hashlib.sha256(OTHER).hexdigest()}"):
        read(store, str(folder / "a.bin"))


@pytest.mark.parametrize("uri", ["", "missing", "s3://no"])
def test_missing_weights_say_where_they_belong(uri: str, store: Store, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"LPIPS: no file of sha256|not a bucket name"):
        read(store, str(tmp_path / uri) if uri == "missing" else uri)


def test_no_weights_named(store: Store) -> None:
    with pytest.raises(ValueError, match="no weights are given"):
        read(store, "x", sha256="")
