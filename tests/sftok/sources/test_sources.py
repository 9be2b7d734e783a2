import datetime
import io
import logging
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from infra.store.s3 import Bucket
from sftok.config import DataConfig
from sftok.images.preprocess import to_rgb
from sftok.sources import digits
from sftok.sources.sources import RejectedEntryError, Source, check_source, list_source
from sftok.sources.summary import summarize


def png(color: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (color % 256, color // 256, 0)).save(file, "PNG")
    return file.getvalue()


def fill(root, *paths):
    for number, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(png(number))
    return root


def ids(source: Source) -> list[str]:
    return [entry.image_id for entry in source.entries]


def problems(source: Source) -> dict[str, str]:
    return {entry.image_id: entry.problem for entry in source.entries if entry.problem}


def test_digits():
    source = list_source("sklearn:digits")
    assert len(source.entries) == 1797
    assert source.class_names == tuple("0123456789")
    assert ids(source)[7] == "digits/0007.png"
    scans = load_digits()
    assert np.array_equal(digits._digits()[0], scans.images)
    assert [int(entry.class_name) for entry in source.entries] == scans.target.tolist()
    for index in (0, 7, 1796):
        data = source.read(source.entries[index])
        assert len(data) == source.entries[index].size
        image = to_rgb(data)
        assert image.size == (32, 32)
        back = np.asarray(image.convert("L").resize((8, 8), Image.Resampling.BOX)) / 255 * 16
        assert np.corrcoef(back.ravel(), scans.images[index].ravel())[0, 1] > 0.97
    assert list_source("sklearn:digits").digest == source.digest


def test_folders_with_both_splits(tmp_path):
    source = list_source(str(fill(tmp_path, "train/b/1.png", "train/a/x/2.png", "val/a/1.png", "val/b/1.png")))
    assert ids(source) == ["train/a/x/2.png", "train/b/1.png", "val/a/1.png", "val/b/1.png"]
    assert source.class_names == ("a", "b")
    assert [(entry.split, entry.class_name) for entry in source.entries] == [
        ("train", "a"),
        ("train", "b"),
        ("val", "a"),
        ("val", "b"),
    ]
    assert source.read(source.entries[0]) == png(1)
    assert pickle.loads(pickle.dumps(source)) == source, "workers get it by pickle"


def test_folders_without_splits(tmp_path):
    source = list_source(f"file://{fill(tmp_path, 'b/1.png', 'a/2.png')}")
    assert ids(source) == ["a/2.png", "b/1.png"]
    assert {entry.split for entry in source.entries} == {None}


def test_train_alone_is_split_by_hash_and_says_what_is_not_read(tmp_path, caplog):
    fill(tmp_path, "train/a/1.png", "train/b/1.png", "test/a/1.png")
    with caplog.at_level(logging.INFO):
        source = list_source(str(tmp_path))
    assert ids(source) == ["test/", "train/a/1.png", "train/b/1.png"]
    assert problems(source) == {"test/": "neither train nor val"}
    assert {entry.split for entry in source.entries} == {None}
    assert "not test" in caplog.text
    assert "no val folder" in caplog.text


def test_a_class_may_be_called_train(tmp_path):
    source = list_source(str(fill(tmp_path, "train/1.png", "bus/1.png", "car/1.png")))
    assert source.class_names == ("bus", "car", "train")


def test_a_test_split_beside_the_classes_is_no_class(tmp_path):
    fill(tmp_path / "data", "a/1.png", "b/1.png", "test/a/1.png")
    (tmp_path / "names").write_text("a\nb\n")
    config = DataConfig(image_size=8, class_names_file=str(tmp_path / "names"))
    check_source(str(tmp_path / "data"), config)
    assert problems(list_source(str(tmp_path / "data"), config)) == {"test/": "neither train nor val"}


def test_names_of_any_kind(tmp_path):
    names = [
        "ü 日本 🦆.png",
        "é.png",
        "e\u0301.png",
        "'\"`.png",
        "a\nb\r.png",
        "<b>&amp;</b>.png",
        "%2e%2e.png",
        "a\\b.png",
        " ",
        "-rf",
    ]
    fill(tmp_path, *(f"a, b'\n<i>/{name}" for name in names))
    source = list_source(str(tmp_path))
    assert sorted(ids(source)) == sorted(f"a, b'\n<i>/{name}" for name in names)
    assert not problems(source)
    assert sorted(map(source.read, source.entries)) == sorted(png(number) for number in range(len(names)))


def test_what_cannot_be_an_image_is_listed_with_the_reason(tmp_path):
    fill(tmp_path, "a/good.png", "a/folder.png/inside.png", "loose.PNG", "notes.txt", "a/.DS_Store", "a/._good.png")
    folder = tmp_path / "a"
    (folder / "broken.png").symlink_to("nowhere.png")
    (folder / "self.png").symlink_to("self.png")
    (folder / "up").symlink_to(tmp_path, target_is_directory=True)
    (folder / "link.png").symlink_to("good.png")
    (tmp_path / "empty.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    os.close(os.open(os.fsencode(folder) + b"/caf\xe9.png", os.O_CREAT | os.O_WRONLY))
    source = list_source(str(tmp_path))
    assert problems(source) == {
        "a/.DS_Store": "a hidden file",
        "a/._good.png": "a hidden file",
        "a/broken.png": "broken symbolic link to 'nowhere.png'",
        "a/caf\\xe9.png": "the file's name is not UTF-8",
        "a/folder.png": "a folder named like an image",
        "a/pipe.png": "not a regular file",
        "a/self.png": "broken symbolic link to 'self.png'",
        "a/up": "a symbolic link to a folder above it",
        "empty.png": "a folder named like an image",
        "loose.PNG": "not in a class folder",
        "notes.txt": "a file beside the images",
    }
    assert [name for name in ids(source) if name not in problems(source)] == [
        "a/folder.png/inside.png",
        "a/good.png",
        "a/link.png",
    ]
    assert source.class_names == ("a",)


def test_odd_names_in_a_bucket_are_listed_with_the_reason(monkeypatch):
    keys = ["a/1.png", "a//2.png", "a/../3.png", "a/./4.png", "a/folder.png/5.png", "a/marked.png/", "a/._6.png", "a/"]
    now = datetime.datetime.now(tz=datetime.UTC)

    def pages(_, prefix, **options):
        found = [key for key in (f"x//y/{key}" for key in keys) if key.startswith(prefix)]
        whole = [key for key in found if not options or "/" not in key[len(prefix) :]]
        folders = {prefix + key[len(prefix) :].partition("/")[0] + "/" for key in found if key not in whole}
        contents = [{"Key": key, "Size": 1, "ETag": f'"{key}"', "LastModified": now} for key in whole]
        yield {"CommonPrefixes": [{"Prefix": folder} for folder in sorted(folders)], "Contents": contents}

    monkeypatch.setattr(Bucket, "_pages", pages)
    source = list_source("s3://bucket/x//y/")
    assert source.uri == "s3://bucket/x//y"
    assert [entry.image_id for entry in source.entries if not entry.problem] == ["a/1.png", "a/folder.png/5.png"]
    reason = "its path has an empty part, '.' or '..'"
    assert problems(source) == {
        **dict.fromkeys(("a//2.png", "a/../3.png", "a/./4.png"), reason),
        **dict.fromkeys(("a/folder.png", "a/marked.png"), "a folder named like an image"),
        "a/._6.png": "a hidden file",
    }


def test_a_linked_class_folder_is_read(tmp_path):
    fill(tmp_path, "elsewhere/1.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert ids(list_source(str(tmp_path / "data"))) == ["a/1.png"]


def test_digest_is_of_paths_sizes_and_times_not_of_order(tmp_path, monkeypatch):
    fill(tmp_path, *(f"{label}/{number}.png" for label in "ab" for number in range(5)))
    before = list_source(str(tmp_path))
    scandir = os.scandir

    class Reversed:
        def __init__(self, path):
            with scandir(path) as items:
                self.items = sorted(items, key=lambda item: item.name, reverse=True)

        def __enter__(self):
            return self.items

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(os, "scandir", Reversed)
    assert list_source(str(tmp_path)) == before
    monkeypatch.undo()

    digests = {before.digest}
    os.utime(tmp_path / "a/0.png", ns=(1, 1))
    digests.add(list_source(str(tmp_path)).digest)
    (tmp_path / "a/0.png").write_bytes(b"other")
    os.utime(tmp_path / "a/0.png", ns=(1, 1))
    digests.add(list_source(str(tmp_path)).digest)
    (tmp_path / "a/0.png").rename(tmp_path / "a/00.png")
    digests.add(list_source(str(tmp_path)).digest)
    assert len(digests) == 4


def test_moved_data_has_the_same_digest(tmp_path):
    fill(tmp_path, "here/a/1.png")
    before = list_source(str(tmp_path / "here")).digest
    (tmp_path / "here").rename(tmp_path / "there")
    assert list_source(str(tmp_path / "there")).digest == before


@pytest.mark.parametrize(
    ("paths", "source", "message"),
    [
        ([], "missing", "missing' does not exist: give a folder"),
        (["file"], "file", "is not a folder"),
        (["1.png", "2.jpg"], "", "holds 2 images but no class folders: put images into DIR/CLASS/"),
        (["train/1.png", "val/1.png"], "", "holds 2 images but no class folders: put images into"),
        ([], "", "holds no images"),
        (["notes.txt"], "", "holds no images"),
        (["train/a/1.png", "train/b/1.png", "val/a/1.png"], "", "class 'b' is in train and not in val"),
        (["train/a/1.png", "val/a/1.png", "val/c/1.png"], "", "class 'c' is in val and not in train"),
        (["val/a/1.png"], "", "has val folders but no train folders: add them"),
    ],
)
def test_what_is_no_dataset_is_refused_with_a_remedy(tmp_path, paths, source, message):
    fill(tmp_path, *paths)
    with pytest.raises(ValueError, match=message):
        list_source(str(tmp_path / source))


def test_empty_class_folders_are_refused(tmp_path):
    fill(tmp_path, "a/1.png")
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match="b' is empty: put images into it"):
        list_source(str(tmp_path))


@pytest.mark.parametrize("source", ["", "https://me:hunter2@example.org/data", "sklearn:iris", "gs://bucket/data"])
def test_other_sources_are_refused(source):
    with pytest.raises(ValueError, match="sklearn:digits") as caught:
        list_source(source)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("s3://key:hunter2@bucket/x", "source s3://bucket: credentials do not belong in a URI; set AWS"),
        ("s3://B/x", "source s3://B: not a bucket name .* write s3://bucket/prefix"),
        ("file://me:hunter2@host/x", "source file://host/...: a folder on another machine; write file:///folder"),
    ],
)
def test_places_that_no_source_can_be_at(uri, message):
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        list_source(uri)
    assert "hunter2" not in str(caught.value)


def test_a_file_that_went_away_is_rejected_and_other_errors_pass(tmp_path, monkeypatch):
    source = list_source(str(fill(tmp_path, "a/1.png")))
    (tmp_path / "a/1.png").unlink()
    with pytest.raises(RejectedEntryError, match="gone"):
        source.read(source.entries[0])

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(OSError, match="Input/output"):
        source.read(source.entries[0])


def test_a_summary_says_what_was_read_as_what(tmp_path):
    fill(tmp_path, *(f"Train/{label}/{at}.png" for label in ("dog", "cat") for at in range(3)), "Train/notes.txt")
    fill(tmp_path, "Val/dog/1.png", "Val/cat/1.png", "Val/cat/.checkpoints/1.png")
    (tmp_path / "Val/dog/lost.png").symlink_to("nowhere.png")
    config = DataConfig(image_size=8)
    summary = summarize(list_source(str(tmp_path), config), config)
    assert (summary.kind, summary.images, summary.splits) == ("folder", 8, {"train": 6, "val": 2})
    assert (summary.classes, summary.class_names, summary.empty_classes) == (2, ("cat", "dog"), ())
    assert summary.left_out == {"a file beside the images": 1, "a hidden folder": 1}
    assert summary.rejected == {"broken symbolic link to 'nowhere.png'": 1}
    assert summary.remarks == (f"read as folder; write folder:{tmp_path} to state it", "train: Train/", "val: Val/")
    assert summary.lines()[:2] == [
        f"source {tmp_path}: folder, 8 images (train 6, val 2), 2 classes (cat, dog)",
        "  left out: 1 x a file beside the images; 1 x a hidden folder",
    ]


def test_a_summary_says_that_images_are_held_out_by_hash_and_which_classes_are_empty(tmp_path):
    fill(tmp_path / "data", *(f"10/{at}.png" for at in range(3)), "9/1.png")
    (tmp_path / "names").write_text("9\n10\n11\n")
    config = DataConfig(image_size=8, class_names_file=str(tmp_path / "names"))
    summary = summarize(list_source(f"folder:{tmp_path}/data", config), config)
    assert (summary.splits, summary.class_names, summary.empty_classes) == ({"by hash": 4}, ("9", "10", "11"), ("11",))
    assert summary.remarks == ("no val split: a hash of the image ids holds out 0.1 of them",)


@pytest.mark.parametrize(
    ("labels", "names", "said"),
    [
        ("required", "", "classes are named in the files"),
        ("none", "", "no labels"),
        ("required", "abcde", "5 classes (a, b, c, d, e)"),
        ("required", "abcdef", "6 classes (a, b, c, d, e ...)"),
    ],
)
def test_a_summary_says_what_is_known_of_classes_in_containers(tmp_path, labels, names, said):
    fill(tmp_path, "data/0.tar")
    (tmp_path / "names").write_text("\n".join(names))
    file = str(tmp_path / "names") if names else ""
    config = DataConfig(image_size=8, labels=labels, class_names_file=file)
    (line, *_) = summarize(list_source(str(tmp_path / "data"), config), config).lines()
    assert line == f"source {tmp_path}/data: webdataset, 1 files (by hash 1), {said}"
