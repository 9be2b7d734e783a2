"""WebDataset: every member of a tar becomes an image, or is told; nothing is written."""

import io
import logging
import os
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.store.store import Store
from sftok.prepare.prepare import prepare
from sftok.sources.listing import ContainerTask
from sftok.sources.patterns import expand
from sftok.sources.sources import list_source
from tests.support.image_sources import CONFIG, image_bytes, reasons, rows_of, run, samples, tar_bytes, write_files


def linked(name: str, kind: bytes, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def folder(name: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = tarfile.DIRTYPE
    return info


def test_samples_have_images_classes_and_splits(tmp_path, store):
    files = {f"train/{part}.tar": tar_bytes(samples(range(part * 10, part * 10 + 10))) for part in range(2)}
    root = write_files(tmp_path / "data", files | {"val/0.tar": tar_bytes(samples(range(90, 96)))})
    source = list_source(str(root))
    assert len(source.entries) == 0
    assert [container.split for container in source.containers] == ["train", "train", "val"]
    prepared = run(root, store)
    assert prepared.counts == {
        "found": 26,
        "accepted": 26,
        "rejected": 0,
        "left_out": 0,
        "train": 20,
        "val": 6,
        "classes": 2,
    }
    for row in rows_of(store, prepared):
        tar, _, name = row["image_id"].rpartition("/")
        number = int(name.removesuffix(".png"))
        assert (root / tar).is_file()
        assert row["image"]["bytes"] == image_bytes(number)
        assert row["label"] == number % 2
        assert row["split"] == tar.split("/")[0]
    assert not [name for name in store.list() if name.startswith("opened")], "what was found in the tars is removed"


def test_labels_are_numbers_or_names_of_cls_or_json(tmp_path, store):
    members = [("a/1.jpg", image_bytes(1, "JPEG")), ("a/1.cls", b"cat\n"), ("a/2.webp", image_bytes(2, "WEBP"))]
    members += [("a/2.json", b'{"label": "dog"}'), ("3.JPEG", image_bytes(3, "JPEG")), ("3.json", b'{"class": "dog"}')]
    members += [("4.png", image_bytes(4)), ("4.json", b'{"label": null, "class": "cat"}'), ("5.png", image_bytes(5))]
    members += [("5.cls", b"cat"), ("5.json", b'{"label": "dog"}'), ("6.png", image_bytes(6)), ("6.cls", b"dog")]
    root = write_files(tmp_path / "data", {"x.tar": tar_bytes(members)})
    prepared = run(root / "x.tar", store)
    labels = {row["image_id"]: row["label"] for row in rows_of(store, prepared)}
    assert labels == {
        "x.tar/a/1.jpg": 0,
        "x.tar/a/2.webp": 1,
        "x.tar/3.JPEG": 1,
        "x.tar/4.png": 0,
        "x.tar/5.png": 0,
        "x.tar/6.png": 1,
    }


def test_numbers_are_named_by_a_file(tmp_path, store):
    root = write_files(tmp_path / "data", {"x.tar": tar_bytes(samples(range(20)))})
    (tmp_path / "names").write_text("tabby cat\nhot dog, frankfurter\nnever seen\n")
    config = CONFIG.model_copy(update={"class_names_file": str(tmp_path / "names")})
    assert list_source(str(root), config).digest != list_source(str(root)).digest
    prepared = prepare(list_source(str(root), config), config, out=store)
    assert prepared.counts["classes"] == 3
    (tmp_path / "names").write_text("tabby cat\n")
    other = store.at("other")
    assert run(root, other, class_names_file=str(tmp_path / "names")).counts["accepted"] == 10
    assert set(reasons(other).values()) == {"its label 1 is not between 0 and 0"}


def test_what_is_odd_in_a_tar_is_told(tmp_path, store):
    good = image_bytes(1)
    members = [
        *samples(range(10, 18)),
        ("./dotted//1.png", good),
        ("dotted/1.cls", b"1"),
        ("../escape.png", good),
        ("a/../../escape.png", good),
        ("/etc/escape.png", good),
        ("..\\escape.png", good),
        (linked("soft.png", tarfile.SYMTYPE, "/etc/passwd"), b""),
        (linked("hard.png", tarfile.LNKTYPE, "00010.png"), b""),
        (linked("pipe.png", tarfile.FIFOTYPE, ""), b""),
        (folder("folder.png"), b""),
        (folder("folder"), b""),
        ("twice.png", good),
        ("twice.cls", b"0"),
        ("twice.png", image_bytes(2)),
        ("two.png", good),
        ("two.cls", b"0"),
        ("two.jpg", image_bytes(2, "JPEG")),
        ("masked.seg.png", image_bytes(3)),
        ("masked.png", good),
        ("masked.cls", b"1"),
        ("text.txt", b"no image"),
        ("text.cls", b"0"),
        ("unlabelled.png", good),
        ("far.png", good),
        ("far.cls", b"999999999999"),
        ("below.png", good),
        ("below.cls", b"-7"),
        ("none.png", good),
        ("none.cls", b"-1"),
        ("bytes.png", good),
        ("bytes.cls", b"\xff\xfe"),
        ("json.png", good),
        ("json.json", b"{"),
        ("list.png", good),
        ("list.json", b'{"label": [1]}'),
        ("broken.png", b"no image"),
        ("broken.cls", b"0"),
        ("empty.png", b""),
        ("empty.cls", b"0"),
        ("caf\udce9.png", good),
        ("._00010.png", b"litter"),
        (".DS_Store", b"litter"),
    ]
    root = write_files(tmp_path / "data", {"x.tar": tar_bytes(members)})
    before = sorted(tmp_path.rglob("*"))
    prepared = run(root, Store("file://" + str(store.path)))
    told = {path.removeprefix("x.tar/"): reason for path, reason in reasons(store).items()}
    assert told == {
        "._00010.png": "a hidden file",
        ".DS_Store": "a hidden file",
        "../escape.png": "its path leads out of the tar",
        "a/../../escape.png": "its path leads out of the tar",
        "/etc/escape.png": "its path leads out of the tar",
        "..\\escape.png": "its path leads out of the tar",
        "soft.png": "a link to '/etc/passwd'",
        "hard.png": "a link to '00010.png'",
        "pipe.png": "not a regular file",
        "folder.png": "a folder named like an image",
        "twice.png": "the tar holds a member of this name before",
        "two.jpg": "a second image of one key",
        "masked.seg.png": "a second image of one key",
        "text": "no image among its members (cls, txt): name images .jpg, .png or the like",
        "unlabelled.png": "it has no label",
        "none.png": "it has no label",
        "far.png": "its label 999999999999 is not between 0 and 999999",
        "below.png": "its label -7 is not between 0 and 999999",
        "bytes.png": "its label is not UTF-8",
        "json.png": "its .json cannot be read",
        "list.png": "its label '[1]' is neither a number nor a name",
        "broken.png": "not an image in a known format",
        "empty.png": "empty file",
        "caf\\xe9.png": "the file's name is not UTF-8",
    }
    taken = {row["image_id"]: row["image"]["bytes"] for row in rows_of(store, prepared)}
    assert taken.keys() == {f"x.tar/{number:05d}.png" for number in range(10, 18)} | {
        f"x.tar/{name}" for name in ("dotted/1.png", "twice.png", "two.png", "masked.png")
    }
    assert taken["x.tar/twice.png"] == taken["x.tar/masked.png"] == good
    assert prepared.counts["found"] == len(told) + 12
    after = [path for path in tmp_path.rglob("*") if not path.is_relative_to(store.path) and path != store.path]
    assert sorted(after) == before, "nothing is extracted"
    assert not list(store.path.rglob("*escape*"))


def whole() -> bytes:
    return tar_bytes(samples(range(12)))


def cut(at: int) -> bytes:
    return whole()[:at]


def overwritten(at: int) -> bytes:
    data = whole()
    return data[:at] + b"\x55" * 512 + data[at + 512 :]


MEMBER = 1024  # header and one block of data


@pytest.mark.parametrize(
    ("data", "reason", "accepted"),
    [
        (b"", "the tar is damaged: empty file", 0),
        (b"no tar at all" * 100, "the tar is damaged: ", 0),
        (b"\x1f\x8b" + bytes(600), "the tar is compressed: rename it to .tar.gz", 0),
        (cut(8 * MEMBER + 100), "the tar is damaged", 4),
        (cut(8 * MEMBER), "the tar has no end mark: it may be truncated at byte 8192", 4),
        (cut(8 * MEMBER + 550), "the tar is damaged", 4),
        (overwritten(8 * MEMBER), "the tar is damaged at byte 8192: what follows is not read", 4),
        (whole() + tar_bytes(samples([77])), "the tar goes on after its end mark", 12),
    ],
)
def test_damaged_tars_are_told_and_what_can_be_read_of_them_is(tmp_path, store, data, reason, accepted):
    root = write_files(tmp_path / "data", {"bad.tar": data, "good.tar": tar_bytes(samples(range(50, 60)))})
    prepared = run(root, store)
    told = reasons(store)
    assert reason in told["bad.tar"]
    assert "\n" not in told["bad.tar"]
    from_bad = [row["image_id"] for row in rows_of(store, prepared) if row["image_id"].startswith("bad.tar/")]
    assert len(from_bad) == accepted
    assert prepared.counts["accepted"] == accepted + 10


@given(st.integers(0, 6000), st.binary(min_size=1, max_size=40))
@settings(max_examples=60, deadline=None)
def test_no_tar_raises_anything_or_loses_anything(tmp_path_factory, at, junk):
    data = tar_bytes(samples(range(3)))
    at = min(at, len(data))
    root = tmp_path_factory.mktemp("data")
    source = list_source(str(write_files(root, {"x.tar": data[:at] + junk + data[at + len(junk) :]})))
    assert source.unpack is not None
    entries = list(source.unpack(ContainerTask(source.containers[0], 0, Store(root / "unused"))))
    found = {entry.image_id for entry in entries if entry.problem is None}
    assert found == {f"x.tar/{number:05d}.png" for number in range(3)} or any(entry.problem for entry in entries)


@pytest.mark.parametrize(
    "name", ["ü 日本 🦆", "'\"`", "a\nb\r", "<b>&amp;</b>", "a\\b", "%2e%2e", " ", "-rf", "é", "e\u0301"]
)
def test_names_of_any_kind(tmp_path, store, name):
    members = [(f"c, '\n<i>/{name}{number}.png", image_bytes(number)) for number in range(4)]
    members += [(f"c, '\n<i>/{name}{number}.cls", name.encode() + b"x") for number in range(4)]
    root = write_files(tmp_path / "data", {"a b'\n.tar": tar_bytes(members)})
    prepared = run(root, store)
    ids = {row["image_id"] for row in rows_of(store, prepared)}
    assert ids == {f"a b'\n.tar/c, '\n<i>/{name}{number}.png" for number in range(4)}


def test_patterns_name_their_files(tmp_path, store):
    files = {f"d/train-{part:03d}.tar": tar_bytes(samples(range(part * 4, part * 4 + 4))) for part in range(4)}
    root = write_files(tmp_path, files)
    prepared = run(f"{root}/d/train-{{000..002}}.tar", store)
    assert prepared.counts["found"] == 12
    assert {row["image_id"].split("/")[0] for row in rows_of(store, prepared)} == {
        f"train-{n:03d}.tar" for n in range(3)
    }
    with pytest.raises(ValueError, match=r"'train-004.tar' does not exist \(1 of 5 files\)"):
        list_source(f"{root}/d/train-{{000..004}}.tar")
    assert expand("s3://b/{a,b}/{8..10}.tar") == [f"s3://b/{x}/{n}.tar" for x in "ab" for n in ("8", "9", "10")]
    for wrong in ("{}.tar", "{5..3}.tar", "{a}.tar"):
        with pytest.raises(ValueError, match="no range such as"):
            list_source(str(root / wrong))
    with pytest.raises(ValueError, match="stands for 100000000000 files"):
        list_source(str(root / "{0..99999999999}.tar"))


def test_the_test_split_is_not_read_and_val_alone_is_refused(tmp_path, store, caplog):
    tar = tar_bytes(samples(range(4)))
    root = write_files(tmp_path / "a", {"x-train-0.tar": tar, "x-validation-0.tar": tar, "x-test-0.tar": tar})
    with caplog.at_level(logging.WARNING):
        source = list_source(str(root))
    assert [(c.path, c.split) for c in source.containers] == [("x-train-0.tar", "train"), ("x-validation-0.tar", "val")]
    assert "not x-test-0.tar" in caplog.text
    with pytest.raises(ValueError, match="val files but no train files"):
        list_source(str(write_files(tmp_path / "b", {"val/0.tar": tar})))


def test_unlabelled_only_where_asked(tmp_path, store):
    members = [(f"{number}.png", image_bytes(number)) for number in range(8)]
    root = write_files(tmp_path / "data", {"x.tar": tar_bytes(members)})
    with pytest.raises(ValueError, match=r"has no labels .* set data.labels = none"):
        run(root, store.at("a"))
    for labels in ("optional", "none"):
        prepared = run(root, store.at(labels), labels=labels)
        assert (prepared.counts["accepted"], prepared.counts["classes"]) == (8, 0)
    labelled = write_files(tmp_path / "labelled", {"x.tar": tar_bytes([*members, ("1.cls", b"3")])})
    assert run(labelled, store.at("b"), labels="none").counts["classes"] == 0
    prepared = run(labelled, store.at("c"), labels="optional", val_fraction=0.001)
    assert {row["label"] for row in rows_of(store.at("c"), prepared)} == {None, 3}


LABELLED = "add them, or set data.labels = none to go without classes"


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        (("json", b'{"label": [1]}'), r"its label '\[1\]' is neither a number nor a name"),
        (("json", b'{"label": 1.5}'), r"its label '1.5' is neither a number nor a name"),
        (("json", b'{"caption": "x", "id": 1}'), r"no label among its members \(json, png; .json has caption, id\)"),
        (("txt", b"cat"), r"no label among its members \(png, txt\)"),
        (("b.cls", b"1"), r"no label among its members \(b.cls, png; a key ends at its first dot\)"),
    ],
)
def test_what_is_no_label_is_said_with_an_example(tmp_path, store, label, reason):
    members = [part for n in "12" for part in ((f"{n}.png", image_bytes(1)), (f"{n}.{label[0]}", label[1]))]
    root = write_files(tmp_path / "d", {"x.tar": tar_bytes(members)})
    with pytest.raises(
        ValueError, match=rf"no labels \(2 of 2 entries are rejected, such as 'x.tar/1.png': {reason}\): {LABELLED}"
    ) as told:
        run(root, store)
    assert len(str(told.value)) <= 400
    assert run(root, store.at("none"), labels="none").counts["accepted"] == 2, "the remedy"


@pytest.mark.parametrize(("text", "label"), [(b"true", 1), (b"1.0", 1), (b'"1"', 1), (b"false", 0)])
def test_labels_in_json_are_whole_numbers_of_any_kind(tmp_path, store, text, label):
    members = [part for n in "12" for part in ((f"{n}.png", image_bytes(1)), (f"{n}.json", b'{"label": %s}' % text))]
    prepared = run(write_files(tmp_path / "d", {"x.tar": tar_bytes(members)}), store)
    assert {row["label"] for row in rows_of(store, prepared)} == {label}


def test_a_source_without_images_says_what_it_has_instead(tmp_path, store):
    members = [part for n in "12" for part in ((n, image_bytes(1)), (f"{n}.cls", b"1"))]
    reason = r"such as 'x.tar/1': no image among its members \(cls\): name images .jpg, .png or the like"
    with pytest.raises(ValueError, match=rf"has no usable image \(2 of 2 entries are rejected, {reason}\): mend"):
        run(write_files(tmp_path / "d", {"x.tar": tar_bytes(members)}), store)


def test_keys_end_at_the_first_dot_of_a_name(tmp_path, store):
    """As in the library webdataset: a.seg.png is the field seg.png of sample a, and v1.0/a.png is sample v1.0/a."""
    members = [
        (f"v1.0/{n}.{end}", data)
        for n in "123"
        for end, data in (("seg.png", b"x"), ("png", image_bytes(1)), ("cls", b"0"))
    ]
    prepared = run(write_files(tmp_path / "d", {"x.tar": tar_bytes(members)}), store)
    assert {row["image_id"] for row in rows_of(store, prepared)} == {f"x.tar/v1.0/{n}.png" for n in "123"}
    assert reasons(store) == {f"x.tar/v1.0/{n}.seg.png": "a second image of one key" for n in "123"}


def test_numbers_and_names_do_not_mix(tmp_path, store):
    members = [*samples(range(4)), ("5.png", image_bytes(5)), ("5.cls", b"dog")]
    with pytest.raises(ValueError, match=r"numbers \(0\) and names \('dog'\)"):
        run(write_files(tmp_path / "data", {"x.tar": tar_bytes(members)}), store)


def test_listing_digest_is_of_the_tars_without_reading_them(tmp_path, monkeypatch):
    root = write_files(tmp_path / "data", {"x.tar": tar_bytes(samples(range(4)))})
    for module in ("builtins", "io"):
        monkeypatch.setattr(f"{module}.open", lambda *_, **__: pytest.fail("read"))
    before = list_source(str(root)).digest
    assert list_source(str(root)).digest == before
    os.utime(root / "x.tar", ns=(1, 1))
    assert list_source(str(root)).digest != before


def test_a_broken_link_to_a_tar_is_told(tmp_path, store):
    root = write_files(tmp_path / "data", {"x.tar": tar_bytes(samples(range(8)))})
    (root / "y.tar").symlink_to("nowhere")
    run(root, store)
    assert reasons(store) == {"y.tar": "broken symbolic link to 'nowhere'"}


def test_sparse_members_are_no_images(tmp_path, store):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        info = tarfile.TarInfo("sparse.png")
        info.type = tarfile.GNUTYPE_SPARSE
        tar.addfile(info)
        for name, data in samples(range(4)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    run(write_files(tmp_path / "data", {"x.tar": file.getvalue()}), store)
    assert reasons(store) == {"x.tar/sparse.png": "not a regular file"}
