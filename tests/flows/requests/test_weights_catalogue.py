"""`sftok weights`: files of others into the store, checked by hash and by what they hold."""

import functools
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.requests import weights_catalogue
from flows.requests.weights_catalogue import CATALOGUE, missing, record_of
from infra.artifacts.pretrained import PretrainedConfig, read_pretrained
from infra.store.store import Store
from tests.support.weights_cli import a_teacher, a_tokenizer, run, written


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """A teacher's file in the published layout."""
    (tmp_path / "given").mkdir()
    return written(tmp_path / "given", a_teacher())


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def run_json(capsys: pytest.CaptureFixture[str], *arguments: object):
    assert run("weights", *arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_the_list_says_all_that_one_has_to_know(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    found = {one["name"]: one for one in run_json(capsys, "--store", store.uri)}
    assert set(found) == set(CATALOGUE)
    assert all(one["licence"] and one["source"] and one["use"] for one in found.values())
    assert not any(one["in_store"] for one in found.values())
    assert found["inception-2015"]["sha256"].startswith("6726825d"), "the hash that is in the file's own name"
    assert run("weights", "--store", store.uri) == 0
    out = capsys.readouterr().out
    assert all(f"{name} " in out for name in CATALOGUE)
    assert "not published; noted when it is added" in out


def test_a_file_that_was_added_is_found_by_name_and_by_hash(
    store: Store, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = run_json(capsys, "add", "maskgit-vqgan", teacher, "--store", store.uri)
    sha256 = sha256_of(teacher)
    assert (made["in_store"], made["sha256"]) == (True, sha256)
    assert made["setting"] == f"--set teacher.pretrained.sha256={sha256}"
    assert read_pretrained(PretrainedConfig(sha256=sha256), store, "teacher") == teacher.read_bytes()
    record = record_of(store, "maskgit-vqgan")
    assert record is not None
    assert (record.sha256, record.size) == (sha256, teacher.stat().st_size)
    assert [one["name"] for one in run_json(capsys, "--store", store.uri) if one["in_store"]] == ["maskgit-vqgan"]
    assert run_json(capsys, "add", "maskgit-vqgan", teacher, "--store", store.uri) == made, "twice is once"


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("inception-2015", b"x", "is published with 6726825d0af5"),
        ("lpips-vgg16", b"", "is published with 397923af8e79"),
        ("dino-vits16", b"no weights", "dino.bin"),
        ("maskgit-vqgan", b"no weights", "dino.bin"),
        ("resnet", b"", "'resnet' is not in the catalogue of weights: choose inception-2015"),
    ],
)
def test_what_is_not_the_file_is_refused_and_nothing_is_left(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, data: bytes, said: str
) -> None:
    file = tmp_path / "dino.bin"
    file.write_bytes(data)
    assert run("weights", "add", name, file, "--store", store.uri) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert store.list() == []


def test_weights_of_another_network_are_refused(
    store: Store, tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other").mkdir()
    tokenizer = written(tmp_path / "other", a_tokenizer(legacy=True))
    assert run("weights", "add", "maskgit-vqgan", tokenizer, "--store", store.uri) == 2
    assert "the kind is sftok, not teacher" in capsys.readouterr().err
    assert run("weights", "add", "sftok-b", teacher, "--store", store.uri) == 2
    assert "the kind is teacher, not sftok" in capsys.readouterr().err
    with pytest.raises(ValueError, match="is no file: name a copy of maskgit-vqgan-imagenet"):
        weights_catalogue.add("maskgit-vqgan", str(tmp_path), store=store.uri)


def test_two_files_of_one_name_are_not_both_right(
    store: Store, tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the publisher gave out no hash, the first one that was added is it."""
    assert run("weights", "add", "maskgit-vqgan", teacher, "--store", store.uri) == 0
    model = a_teacher()
    next(iter(model.parameters())).data += 1
    (tmp_path / "other").mkdir()
    other = written(tmp_path / "other", model)
    capsys.readouterr()
    assert run("weights", "add", "maskgit-vqgan", other, "--store", store.uri) == 2
    assert f"maskgit-vqgan is sha256 {sha256_of(teacher)}" in capsys.readouterr().err
    record = record_of(store, "maskgit-vqgan")
    assert record is not None
    assert record.sha256 == sha256_of(teacher)


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; what is called short-... ends before its length."""

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        if "short" in self.path:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"x" * 10)
        else:
            super().do_GET()


@pytest.fixture
def served(teacher: Path) -> Iterator[str]:
    """The address of a server that has the teacher's folder."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=teacher.parent))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch):
    """Gives a name of the catalogue another address, since publishers' cannot be reached from a test."""

    def change(name: str, source: str, **changes: object) -> None:
        monkeypatch.setitem(CATALOGUE, name, CATALOGUE[name]._replace(source=source, **changes))

    return change


def test_fetch_downloads_and_checks(
    store: Store, teacher: Path, served: str, elsewhere, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere("maskgit-vqgan", f"{served}/{teacher.name}")
    made = run_json(capsys, "fetch", "maskgit-vqgan", "--store", store.uri)
    assert made["sha256"] == sha256_of(teacher)
    record = record_of(store, "maskgit-vqgan")
    assert record is not None
    assert record.added_from == f"{served}/{teacher.name}"


@pytest.mark.parametrize(
    ("path", "changes", "said"),
    [
        (
            "none.bin",
            {},
            "cannot be downloaded (File not found): get it elsewhere, then `sftok weights add maskgit-vqgan",
        ),
        ("short", {}, "cannot be downloaded (it ended after 10 of 1,000 bytes)"),
        ("{teacher}", {"sha256": "0" * 64}, "is published with 000000"),
    ],
)
def test_a_download_that_fails_leaves_nothing(
    store: Store, teacher: Path, served: str, elsewhere, capsys: pytest.CaptureFixture[str], path, changes, said
) -> None:
    elsewhere("maskgit-vqgan", f"{served}/{path.format(teacher=teacher.name)}", **changes)
    assert run("weights", "fetch", "maskgit-vqgan", "--store", store.uri) == 2
    assert said in capsys.readouterr().err
    assert store.list() == []


def test_without_a_network_it_says_what_to_do(store: Store, elsewhere, capsys: pytest.CaptureFixture[str]) -> None:
    elsewhere("inception-2015", "http://127.0.0.1:9/weights.pth")
    assert run("weights", "fetch", "inception-2015", "--store", store.uri) == 2
    assert "(Connection refused): get it elsewhere, then `sftok weights add" in capsys.readouterr().err
    assert run("weights", "fetch", "sftok-b", "--store", store.uri) == 2
    assert "sftok-b has no public address: get pytorch_model.bin from its authors" in capsys.readouterr().err
    assert missing("inception-2015", store).startswith("the weights inception-2015 (weights-inception-2015-12-05")
    assert "`sftok weights add sftok-l FILE` puts a copy there" in missing("sftok-l", store)
