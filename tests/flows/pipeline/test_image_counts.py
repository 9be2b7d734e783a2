"""Runs are refused before anything is trained if their images are not enough, with remedies that work."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flows.pipeline.image_counts import ImageCounts, check_counts
from flows.pipeline.images import PREPARE
from flows.recipes.files import load_recipe
from flows.recipes.schema import Recipe
from flows.requests.checks import check_files, check_views
from flows.stage import StageJob, plan_of
from infra.compute.workers import WorkerOptions
from infra.store.store import Store
from sftok.prepare.expected import expected_split
from sftok.prepare.prepare import prepare
from sftok.sources.sources import list_source

ALL = frozenset({"prepare", "evaluate"})
SMALL = ("data.num_shards=2", "data.num_val_shards=1", "data.image_size=64")


def draw(folder: Path, **classes: int) -> Path:
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def plan(source: Path, store: Store, *overrides: str) -> None:
    """What a run asks of its source before its first stage begins."""
    recipe = load_recipe("small64", overrides=(*SMALL, *overrides))
    plan_of(PREPARE, StageJob(recipe, store, str(source), WorkerOptions(), stages=ALL), {})


def remedies(message: str) -> list[str]:
    """The settings that a message proposes, as they are written on a command line."""
    words = shlex.split(message.rpartition("give ")[2])
    return [words[at + 1].rstrip(",") for at, word in enumerate(words) if word == "--set"]


@pytest.mark.parametrize(
    ("classes", "overrides", "said"),
    [
        ({"a": 6, "b": 6}, ["data.val_fraction=0.001"], "1 image is held out, at least 2 are evaluated"),
        ({"a": 12}, ["evaluate.class_reader=true", "data.val_fraction=0.5"], "needs 2 classes, and there is one class"),
        ({"a": 12}, ["sample.per_class=1", "data.val_fraction=0.5"], "makes 1 samples, at least 2 are evaluated"),
    ],
)
def test_what_evaluate_would_refuse_is_refused_before_the_first_stage(tmp_path, store, classes, overrides, said):
    source = draw(tmp_path / "data", **classes)
    with pytest.raises(ValueError, match=said) as caught:
        plan(source, store, *overrides)
    found = remedies(str(caught.value))
    assert found
    plan(source, store, *overrides, *found)


def test_the_proposed_fraction_holds_out_enough_to_be_scored(tmp_path, store):
    source = draw(tmp_path / "data", a=40, b=40)
    scores = ("evaluate.scores.protocol=clean", "evaluate.scores.reference=fid.npz", "evaluate.scores.num_samples=20")
    scored = (*scores, "sample.per_class=10")
    with pytest.raises(ValueError, match=r"scores 20 images at least, and [0-9]+ images are held out") as caught:
        plan(source, store, *scored, "data.val_fraction=0.1")
    (fraction,) = re.findall(r"data\.val_fraction=[0-9.]+", str(caught.value))
    plan(source, store, *scored, fraction)


def test_a_class_whose_only_image_would_be_held_out_is_named_and_a_split_of_its_own_helps(tmp_path, store):
    source = draw(tmp_path / "data", a=1, b=1)
    with pytest.raises(ValueError, match=r"holds out all images of class '[ab]': add images to it, or give the source"):
        plan(source, store)
    (tmp_path / "split").mkdir()
    source.rename(tmp_path / "split" / "train")
    draw(tmp_path / "split" / "val", a=1, b=1)
    plan(tmp_path / "split", store)


@pytest.mark.parametrize("fraction", [0.001, 0.2, 0.5, 0.9])
def test_the_expected_split_is_the_one_that_prepare_makes(tmp_path, store, fraction):
    config = load_recipe("small64", overrides=(*SMALL, f"data.val_fraction={fraction}")).data
    source = list_source(str(draw(tmp_path / "data", a=20, b=20)), config)
    expected = expected_split(source, config)
    made = prepare(source, config, out=store.at("images"))
    assert (expected.train, expected.val, expected.classes) == (made.counts["train"], made.counts["val"], 2)
    for count in range(1, 40):
        if (enough := expected.fraction_for(count)) is not None:
            assert expected_split(source, config.model_copy(update={"val_fraction": enough})).val >= count


def test_rows_without_a_split_are_expected_where_prepare_puts_them(tmp_path, store):
    draw(tmp_path, a=12)
    rows = [f"a/{number}.png,a,{('train', 'val', '')[number % 3]}" for number in range(12)]
    (tmp_path / "index.csv").write_text("\n".join(["path,label,split", *rows]))
    config = load_recipe("small64", overrides=(*SMALL, "data.val_fraction=0.001")).data
    source = list_source(str(tmp_path / "index.csv"), config)
    expected = expected_split(source, config)
    made = prepare(source, config, out=store.at("images"))
    assert (expected.train, expected.val) == (made.counts["train"], made.counts["val"]) == (7, 5)


def digits(*overrides: str) -> Recipe:
    return load_recipe("digits", overrides=overrides)


def test_scores_need_images_and_a_reference():
    scored = digits("evaluate.scores.protocol=adm")
    for counts, said in [
        (
            ImageCounts(100_000, 500, 10),
            "makes 1000 samples, at least 50000 are evaluated",
        ),
        (ImageCounts(100_000, 5, 1000), "scores 20 images at least, and 5 images are held out"),
    ]:
        with pytest.raises(ValueError, match=re.escape(said)):
            check_counts(scored, counts, ALL)
    check_counts(scored, ImageCounts(100_000, 5, 1000), {"prepare", "encode"})


def test_views_that_evaluate_cannot_compare_are_refused():
    flipped = digits('encode.val_variants=["flip"]')
    with pytest.raises(ValueError, match="lacks center") as caught:
        check_views(flipped, ALL)
    check_views(digits(*remedies(str(caught.value))), ALL)


def test_files_that_are_not_there_are_named(tmp_path, store):
    sha256 = "0" * 64
    lost = digits(f"evaluate.lpips.sha256={sha256}", f"evaluate.lpips.uri={tmp_path}/vgg.pth")
    with pytest.raises(ValueError, match=r"evaluate.lpips: no file of sha256 0+ in .*vgg.pth; put it there"):
        check_files(lost, store, ALL)
    (tmp_path / "vgg.pth").write_bytes(b"weights")
    check_files(lost, store, ALL)
    scored = digits("evaluate.scores.protocol=clean", f"evaluate.scores.reference={tmp_path}/fid.npz")
    with pytest.raises(ValueError, match=r"evaluate.scores.reference = .*fid.npz': there is no such file"):
        check_files(scored, store, ALL)


def test_a_disk_without_room_for_the_images_is_refused_before_any_is_written(tmp_path, store, monkeypatch):
    from flows.make import make

    monkeypatch.setattr("flows.pipeline.space.shutil.disk_usage", lambda path: type("Usage", (), {"free": 100}))
    recipe = load_recipe("small64", overrides=SMALL)
    job = StageJob(recipe, store, str(draw(tmp_path / "data", a=20, b=20)), WorkerOptions())
    with pytest.raises(ValueError, match=r"has 100 bytes free, and the run needs .* kB: free some, or choose"):
        make(PREPARE, job, {})
    assert not list(store.path.rglob("*.parquet"))
