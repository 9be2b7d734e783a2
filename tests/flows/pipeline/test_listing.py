"""A source is listed once a run: looked at before, handed from the plan to the call, listed anew by a retry."""

import os
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flows.make import run_stage
from flows.pipeline import graph
from flows.recipes.files import load_recipe
from flows.recipes.schema import EncodeConfig
from flows.requests.checks import check_request
from flows.requests.encode import check_encode_request
from flows.runs.run_request import RunArguments
from flows.stage import Listing, StageJob, Work, plan_of
from infra.artifacts.manifest import folder_of, publish
from infra.compute.workers import WorkerOptions
from infra.errors import TransientError
from infra.progress import silent
from infra.store.store import Store
from sftok.config import DataConfig
from sftok.sources.sources import check_source, list_source
from tests.support.weights_cli import SIZE, a_tokenizer, published

CONFIG = DataConfig(image_size=8)
SETTINGS = ["data.image_size=32", "data.num_shards=2", "data.num_val_shards=1", "data.val_fraction=0.4"]


def draw(folder: Path, classes: int = 2, images: int = 10) -> Path:
    for number in range(classes * images):
        path = folder / f"{number % classes:03d}" / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return draw(tmp_path / "data")


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each folder is listed to its end, by its name; a look at the first few files is none."""
    counts: Counter[str] = Counter()
    real = os.stat

    def counted(path: str | os.PathLike[str], **options: object) -> os.stat_result:
        counts[os.fspath(path)] += str(path).endswith(".png")
        return real(path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("sftok.sources.files.os.stat", counted)
    return counts


def job(data: Path, store: Store, listing: Listing | None) -> StageJob:
    return StageJob(load_recipe("digits", overrides=SETTINGS), store, str(data), WorkerOptions(), listing=listing)


def attempt(job: StageJob) -> Work:
    plan = plan_of(graph.PREPARE, job, {})
    return Work(job, plan, folder_of(job.store, plan.kind, plan.digest), silent)


def test_the_plan_hands_its_listing_to_the_call(data, store, listed) -> None:
    alone = attempt(job(data, store, None))
    twice = run_stage(graph.PREPARE, alone)
    most = max(listed.values())
    listed.clear()
    handed = job(data, Store(data.parent / "other"), Listing())
    once = run_stage(graph.PREPARE, attempt(handed))
    assert [(file.path, file.sha256) for file in once.files] == [(file.path, file.sha256) for file in twice.files]
    assert handed.listing is not None
    assert max(listed.values()) < most
    listed.clear()
    list_source(str(data))
    assert max(listed.values()) == most / 2, "what one listing looks at"


def test_the_whole_command_lists_once(prefect_api, store, data, listed, monkeypatch) -> None:
    """From the check of the request to the codes: no file is looked at more often than by one listing."""
    from flows.pipeline.full import retokenize

    lists: list[str] = []
    real = list_source

    def counted(source: str, config: DataConfig | None = None) -> object:
        lists.append(source)
        return real(source, config)

    monkeypatch.setattr("sftok.sources.sources.list_source", counted)
    monkeypatch.setenv("SFTOK_HOME", str(store.path.parent / "home"))
    tokenizer, encode = str(published(store, a_tokenizer())), EncodeConfig(micro_batch=4)
    request = {"tokenizer": tokenizer, "data": str(data), "store": store.uri, "overrides": (), "workers": 0}
    checked = check_encode_request(encode, **request, gpus_per_worker=0)
    assert lists == []
    record = retokenize(checked, "one")
    assert (record.state, lists) == ("Completed", [str(data)])
    again = retokenize(checked, "two")
    assert (again.stages["prepare"].state, lists) == ("Cached", [str(data)] * 2)


def test_a_retry_lists_anew(data, store) -> None:
    this = job(data, store, Listing())
    first = attempt(this)
    draw(data, images=12)  # four more
    second = attempt(this)
    assert second.plan.digest != first.plan.digest
    assert run_stage(graph.PREPARE, second).counts["found"] == 24


def test_a_file_that_changed_after_the_listing_is_noticed(data, store) -> None:
    this = job(data, store, Listing())
    work, path = attempt(this), next(data.rglob("*.png"))
    before = path.read_bytes()
    path.write_bytes(before + b"more")
    with pytest.raises(TransientError, match=rf"{path.name}' has {len(before) + 4} bytes, {len(before)} when it was"):
        run_stage(graph.PREPARE, work)
    assert run_stage(graph.PREPARE, attempt(this)).counts["found"] == 20


def test_a_plan_without_its_listing_is_compared_with_the_source(data, store) -> None:
    work = attempt(job(data, store, None))
    draw(data, images=11)
    with pytest.raises(TransientError, match="changed while it was listed"):
        run_stage(graph.PREPARE, work)


def test_a_listing_is_held_no_longer_than_it_is_needed(data, store) -> None:
    this = job(data, store, Listing())
    assert this.listing is not None
    plan = plan_of(graph.PREPARE, this, {})
    digest = str(plan.config["listing"])
    copied = pickle.loads(pickle.dumps(this))
    assert copied.listing.take(digest) is None, "ranks and workers are not sent a million entries"
    assert this.listing.take("another") is None
    assert this.listing.take(digest) is None, "taken, even if it was not the one"
    made = run_stage(graph.PREPARE, attempt(this))
    manifest = publish(store, plan, files=made.files, counts=made.counts, metrics={}, seconds=0)
    assert plan_of(graph.PREPARE, this, {}) == plan
    assert graph.PREPARE.accept is not None
    graph.PREPARE.accept(this, manifest)
    assert this.listing.take(digest) is None, "images that were found need no source"


@pytest.mark.parametrize("classes", [12, 48])
def test_the_look_beforehand_does_not_grow_with_the_source(tmp_path, monkeypatch, classes) -> None:
    """Opened are the root and a few folders, however many there are."""
    opened: list[str] = []
    real = os.scandir
    draw(tmp_path / "data", classes, 2)

    def counted(path: str) -> object:
        opened.append(path)
        return real(path)

    monkeypatch.setattr(os, "scandir", counted)
    check_source(str(tmp_path / "data"), CONFIG)
    assert len(opened) <= 13
    list_source(str(tmp_path / "data"), CONFIG)
    assert len(opened) > classes


def files(*names: str) -> Callable[[Path], str]:
    def make(root: Path) -> str:
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(b"x")
        return str(root)

    return make


def index(text: str) -> Callable[[Path], str]:
    def make(root: Path) -> str:
        root.mkdir()
        (root / "index.csv").write_text(text)
        return str(root / "index.csv")

    return make


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda root: str(root), "does not exist"),
        (lambda root: files("x.png")(root) + "/x.png", "is not a folder"),
        (lambda root: root.mkdir() or str(root), "holds no images"),
        (files("1.png", "2.png"), "holds 2 images but no class folders"),
        (files("val/a/1.png", "val/b/1.png"), "no train folders"),
        (files("train/a/1.png", "train/b/1.png", "val/a/1.png"), "class 'b' is in train and not in val"),
        (files("a/1.png", "x.tar"), "say which to read"),
        (index("where,label\na.png,1\n"), "name that of paths in data.image_column"),
        (index("path,label\n"), "names no images"),
        (lambda root: f"{root}/{{0..3}}.tar", "does not exist"),
        (lambda _: "ftp://host/images", "neither a local path nor on S3"),
        (lambda _: "webdataset:", "names no place"),
        (lambda _: "", "no images of its own|no data source is named"),
    ],
)
def test_a_bad_source_is_refused_before_anything_starts(tmp_path, make, said) -> None:
    source = make(tmp_path / "data")
    with pytest.raises(ValueError, match=said) as caught:
        check_source(source, CONFIG)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=said):
        list_source(source, CONFIG)
    with pytest.raises(ValueError, match=said):
        check_request(RunArguments(recipe="small64", data=source, store=str(tmp_path / "store"), workers=0))
    assert not (tmp_path / "store").exists()


def test_class_folders_are_held_against_their_stated_names(tmp_path) -> None:
    (tmp_path / "names.txt").write_text("000\n")
    config = CONFIG.model_copy(update={"class_names_file": str(tmp_path / "names.txt")})
    with pytest.raises(ValueError, match="class folder '001' is not in data"):
        check_source(str(draw(tmp_path / "data")), config)


def test_what_can_be_listed_passes_the_look(tmp_path) -> None:
    for name in ("a/1.png", "b.png/1.png", ".hidden/x", "b.jpg"):
        files(name)(tmp_path / "odd")
    flat = files("1.png", "2.png")(tmp_path / "flat")
    check_source(str(tmp_path / "odd"), CONFIG)
    check_source(flat, CONFIG.model_copy(update={"labels": "none"}))
    check_source(flat, CONFIG.model_copy(update={"labels": "optional"}))
    check_source("sklearn:digits", CONFIG)
    check_source(index("path,label\nmissing.png,1\n")(tmp_path / "index"), CONFIG)
