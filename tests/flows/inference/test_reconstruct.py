"""`sftok reconstruct` on a toy tokenizer: pictures in, pairs and codes out, and what happens to bad pictures."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flows.inference.reconstruct import GAP, contact_sheet
from infra.codes.contract import read_codes
from infra.store.store import Store
from sftok.coding.decode import ImageDecoder
from sftok.coding.encode import encode_images
from sftok.config import DecodingConfig
from sftok.images.preprocess import to_float
from tests.support.weights_cli import SIZE, TEACHER, a_teacher, a_tokenizer, published, run


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """Three formats, modes and sizes, two of one name."""
    (tmp_path / "in" / "other").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (40, 24, 3), dtype=np.uint8)
    files = [tmp_path / "in" / "cat.png", tmp_path / "in" / "other" / "cat.gif", tmp_path / "in" / "dog.jpg"]
    Image.fromarray(noise[:SIZE, :SIZE]).save(files[0])
    Image.fromarray(noise[:, :, 0]).save(files[1])
    Image.fromarray(noise).resize((90, 60)).save(files[2])
    return files


def reconstruct(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> dict:
    assert run("reconstruct", *arguments, "--json") == code
    return json.loads(capsys.readouterr().out)


def pixels(file: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)


def test_pairs_sheet_and_codes(
    store: Store, pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = a_tokenizer(), tmp_path / "out"
    ref = published(store, model)
    made = reconstruct(capsys, *pictures, "--tokenizer", ref, "--out", out, "--steps", 3, "--store", store.uri)
    assert [image["file"] for image in made["images"]] == [str(out / n) for n in ("cat.png", "cat-2.png", "dog.png")]
    assert {file.name for file in out.iterdir()} == {
        "cat.png",
        "cat-2.png",
        "dog.png",
        "contact_sheet.png",
        "codes.parquet",
    }
    # The first picture has the tokenizer's size: the pair holds it untouched, and what the library makes of it.
    pair, original = pixels(out / "cat.png"), pixels(pictures[0])
    codes = encode_images(model, to_float(original)[None], "nearest", 1)
    decoded = ImageDecoder(model, None, micro_batch=1)(codes, ["x"], DecodingConfig(num_steps=3)).images[0]
    assert torch.equal(pair[:, :, :SIZE], original)
    assert torch.equal(pair[:, :, SIZE + GAP :], decoded)

    info, rows = read_codes(Store(out), ["codes.parquet"])
    assert (info.tokenizer, info.assignment, info.image_size) == (ref.digest, "nearest", SIZE)
    assert rows.image_id == sorted(map(str, pictures))
    assert rows.codes[rows.image_id.index(str(pictures[0]))].tolist() == codes[0].tolist()
    assert all(image["psnr"] > 0 for image in made["images"])


def test_a_picture_comes_out_the_same_alone_and_among_others(
    store: Store, pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ref = published(store, a_tokenizer())
    noisy = ["--tokenizer", ref, "--store", store.uri, "--temperature", 5, "--seed"]
    reconstruct(capsys, *pictures, "--out", tmp_path / "all", *noisy, 1)
    reconstruct(capsys, pictures[2], "--out", tmp_path / "one", *noisy, 1)
    reconstruct(capsys, pictures[2], "--out", tmp_path / "two", *noisy, 2)
    hashes = [hashlib.sha256((tmp_path / run / "dog.png").read_bytes()).hexdigest() for run in ("all", "one", "two")]
    assert hashes[0] == hashes[1]
    assert hashes[0] != hashes[2]


def test_pictures_that_cannot_be_read_are_reported_after_the_others(
    store: Store, pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut, text, out = tmp_path / "cut.png", tmp_path / "notes.jpg", tmp_path / "out"
    cut.write_bytes(pictures[0].read_bytes()[:-200])
    text.write_text("hello")
    ref = published(store, a_tokenizer())
    arguments = [cut, pictures[0], tmp_path / "none.png", text, pictures[2], "--out", out]
    assert run("reconstruct", *arguments, "--tokenizer", ref, "--store", store.uri, "--json") == 1
    printed = capsys.readouterr()
    made = json.loads(printed.out)
    assert [image["image"] for image in made["images"]] == [str(pictures[0]), str(pictures[2])]
    reasons = {Path(reject["image"]).name: reject["reason"] for reject in made["rejected"]}
    assert reasons.keys() == {"cut.png", "none.png", "notes.jpg"}
    assert "cannot be decoded" in reasons["cut.png"]
    assert reasons["none.png"] == "No such file or directory"
    assert reasons["notes.jpg"] == "not an image in a known format"
    assert printed.err.splitlines()[-1] == "sftok: 3 of 5 pictures could not be read"
    assert read_codes(Store(out), ["codes.parquet"])[1].image_id == sorted(map(str, (pictures[0], pictures[2])))


def test_no_picture_at_all(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ref = published(store, a_tokenizer())
    out = tmp_path / "out"
    made = reconstruct(capsys, "none.png", "--tokenizer", ref, "--out", out, "--store", store.uri, code=1)
    assert (made["images"], made["codes"], made["contact_sheet"]) == ([], None, None)
    assert not list(out.iterdir())


def test_the_teacher_is_found_through_the_manifest(
    store: Store, pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a pixel decoder, ids are decoded by the teacher that the tokenizer was trained with."""
    teacher, model = a_teacher(), a_tokenizer(pixels=False)
    teacher_ref = published(store, teacher)
    ref = published(store, model, teacher=teacher_ref)
    reconstruct(capsys, pictures[0], "--tokenizer", ref, "--out", tmp_path / "found", "--store", store.uri)
    codes = encode_images(model, to_float(pixels(pictures[0]))[None], "nearest", 1)
    decoded = ImageDecoder(model, teacher, micro_batch=1)(codes, ["x"], DecodingConfig()).images[0]
    assert torch.equal(pixels(tmp_path / "found" / "cat.png")[:, :, SIZE + GAP :], decoded)

    alone = published(store, model)
    arguments = [pictures[0], "--tokenizer", alone, "--store", store.uri, "--out", tmp_path / "given"]
    assert run("reconstruct", *arguments) == 2
    assert "names no teacher: give one by --teacher REF" in capsys.readouterr().err
    reconstruct(capsys, *arguments, "--teacher", teacher_ref)
    assert (tmp_path / "given" / "cat.png").read_bytes() == (tmp_path / "found" / "cat.png").read_bytes()


def test_what_does_not_fit_is_refused_before_anything_is_written(
    store: Store, pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    teacher = published(store, a_teacher())
    with_pixels = published(store, a_tokenizer())
    larger = Store(tmp_path / "larger")
    misfit = published(larger, a_teacher(TEACHER.model_copy(update={"codebook_size": 64})))
    alone = published(larger, a_tokenizer(pixels=False))
    for place, arguments, said in [
        (store, ["--tokenizer", with_pixels, "--teacher", teacher], "has a pixel decoder of its own"),
        (store, ["--tokenizer", teacher], "where a tokenizer is wanted"),
        (store, ["--tokenizer", "tokenizer/ffff"], "is no finished artifact"),
        (larger, ["--tokenizer", alone, "--teacher", misfit], "codebook_size = 64"),
        (store, ["--tokenizer", with_pixels, "--steps", 0], "--steps"),
        (store, ["--tokenizer", with_pixels, "--temperature", -1], "--temperature"),
    ]:
        assert run("reconstruct", pictures[0], *arguments, "--out", out, "--store", place.uri) == 2
        printed = capsys.readouterr()
        assert (printed.out, printed.err.count("\n")) == ("", 1)
        assert said in printed.err
    assert not out.exists()


def test_pictures_are_never_overwritten(store: Store, pictures: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    """The pair of cat.png would be the original's own file."""
    before = pictures[0].read_bytes()
    ref = published(store, a_tokenizer())
    arguments = [pictures[0], "--tokenizer", ref, "--out", pictures[0].parent, "--store", store.uri]
    assert run("reconstruct", *arguments) == 2
    assert f"{pictures[0]} exists" in capsys.readouterr().err
    assert pictures[0].read_bytes() == before


def test_without_json_every_picture_has_a_line(
    store: Store, pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ref = published(store, a_tokenizer())
    twice = [pictures[0], *pictures]  # a picture that is named twice is done once
    assert run("reconstruct", *twice, "--tokenizer", ref, "--out", tmp_path / "out", "--store", store.uri) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 + 2
    assert lines[0].startswith(f"{pictures[0]} -> {tmp_path / 'out' / 'cat.png'}  ")
    assert lines[0].endswith(" dB")


@pytest.mark.parametrize("count", [1, 2, 5, 13])
def test_a_contact_sheet_holds_every_picture_once(count: int) -> None:
    given = [torch.full((3, 4, 9), i, dtype=torch.uint8) for i in range(count)]
    sheet = contact_sheet(given)
    assert [int((sheet[0] == i).sum()) for i in range(count)] == [4 * 9] * count
    assert sheet.shape[1] <= 2 * sheet.shape[2]
