"""The evaluate stage on images and codes that stay where they are: the same figures, in memory that does not grow."""

import dataclasses
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flows.evaluation import evaluate as stage
from flows.evaluation.evaluate import evaluate
from flows.evaluation.gallery import samples_shown
from flows.evaluation.inputs import StoredCodes, images_at_once
from flows.evaluation.sweep import SWEEP
from flows.make import run_stage
from flows.pipeline import graph
from flows.recipes.schema import EvaluateConfig
from flows.stage import Work, plan_of
from infra.artifacts.manifest import ArtifactRef, folder_of, key_of, manifest_of
from infra.artifacts.shards import split_of
from infra.codes.contract import CodeRows, CodesInfo, to_parquet
from infra.progress import silent
from infra.store.store import Store
from sftok.config import DataConfig
from sftok.evaluation.meters import code_batches
from sftok.evaluation.samples import summarize_samples
from sftok.images.dataset import ImageSet
from sftok.images.lazy import LazyImages
from sftok.metrics.random_features import RandomFeatures
from sftok.model.teacher import Teacher
from sftok.prepare.prepare import prepare
from sftok.sources.sources import list_source
from tests.support.codes_info import codes_info
from tests.support.sample_evaluation import CODEBOOK, NUM_TOKENS, digits_inputs
from tests.support.small_dataset import Made, draw_images
from tests.support.weights_cli import published

CONFIG = EvaluateConfig(steps=(1,), class_reader=True)
INFO = codes_info(CODEBOOK, NUM_TOKENS, tokenizer="t" * 32, image_size=32, class_names=tuple("0123456789"))


def stored(folder: Store, num_shards: int, split: str = "train", size: int = 32) -> LazyImages:
    """The digits, prepared, where they are."""
    config = DataConfig(image_size=32, val_fraction=0.2, num_shards=num_shards, num_val_shards=2)
    made = prepare(list_source("sklearn:digits"), config, out=folder)
    return LazyImages(folder, {f.path: f.rows or 0 for f in made.files if split_of(f.path) == split}, size)


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> LazyImages:
    return stored(Store(tmp_path_factory.mktemp("five")), 5)


def write_codes(folder: Store, codes: np.ndarray, num_files: int, info: CodesInfo = INFO) -> StoredCodes:
    files = {}
    for number, rows in enumerate(np.array_split(codes, num_files)):
        ids = [f"{number}/{row}" for row in range(len(rows))]
        name = f"train-{number:05d}-of-{num_files:05d}.parquet"
        classes, views = np.zeros(len(rows), np.int32), ["center"] * len(rows)
        folder.write(name, to_parquet(info, CodeRows(ids, classes, views, rows)))
        files[name] = len(rows)
    return StoredCodes(folder, files)


class TestStoredImages:
    def test_they_are_those_of_the_set(self, train) -> None:
        loaded, rows = ImageSet.open(train.store).load("train", 32), train.load()
        assert rows.image_ids == loaded.image_ids
        assert torch.equal(rows.images, loaded.images)
        assert torch.equal(rows.class_ids, loaded.class_ids)
        assert train.shape == rows.images.shape
        assert len(train) == len(rows.image_ids)

    @pytest.mark.parametrize("size", [7, 64, 10_000])
    def test_every_way_of_reading_has_one_order(self, train, size) -> None:
        parts = list(train.split(size))
        assert max(map(len, parts)) <= size
        images, rows, order = torch.cat(parts), train.load(), train.sample(len(train), 0)
        assert torch.equal(images[order], rows.images)
        assert torch.equal(train.labels()[order], rows.class_ids)
        last = len(train) - 1
        assert all(torch.equal(train[index], images[index]) for index in (0, 500, last))
        with pytest.raises(IndexError):
            train[last + 1]

    def test_a_sample_is_the_same_whatever_the_shards(self, train, tmp_path) -> None:
        other, images = stored(Store(tmp_path), 2), {}
        for name, some in (("five", train), ("two", other)):
            images[name] = torch.cat(list(some.split(64)))[some.sample(100, 3)]
        assert torch.equal(images["five"], images["two"])
        assert len(images["five"]) == 100
        assert not torch.equal(train.sample(100, 3), train.sample(100, 4))
        assert len(train.sample(10_000, 3)) == len(train)

    def test_rows_that_are_missing_are_noticed(self, train) -> None:
        name = next(iter(train.shards))
        with pytest.raises(ValueError, match=rf"{name} has \d+ images, its manifest says 9"):
            list(LazyImages(train.store, {name: 9}, 32).split(64))


class TestStoredCodes:
    def test_batches_are_all_rows(self, store) -> None:
        codes = np.random.default_rng(0).integers(0, CODEBOOK, (40_000, NUM_TOKENS)).astype(np.uint16)
        there = write_codes(store, codes, 2)
        batches = list(code_batches(there))
        assert len(there) == 40_000
        assert max(map(len, batches)) < 20_000, "of a file a part at a time as int64"
        found = torch.cat(batches).numpy()
        assert sorted(map(bytes, found.astype(np.uint16))) == sorted(map(bytes, codes))

    def test_files_that_do_not_belong_together_are_refused(self, store) -> None:
        codes = np.zeros((6, NUM_TOKENS), np.uint16)
        there, other = write_codes(store, codes, 2), INFO.model_copy(update={"tokenizer": "u" * 32})
        with pytest.raises(ValueError, match=r"00001-of-00002\.parquet: 3 rows .* expected 4"):
            list(StoredCodes(store, dict.fromkeys(there.files, 3) | {list(there.files)[1]: 4}).batches())
        write_codes(store.at("other"), codes, 2, other)
        store.write(list(there.files)[1], store.read(f"other/{list(there.files)[1]}"))
        with pytest.raises(ValueError, match=r"tokenizer/uuu.* of tokenizer/ttt.*encode again"):
            list(there.batches())


def test_figures_are_those_of_images_and_codes_in_memory(train, store) -> None:
    """Counts, shares, distances and the reader are equal; sums of features in another order but for their rounding."""
    rows, codes = train.load(), np.asarray(digits_inputs().train_codes)
    given = dataclasses.replace(digits_inputs(), train_images=rows.images, train_labels=rows.class_ids)
    streamed = dataclasses.replace(
        digits_inputs(),
        train_images=train,
        train_labels=train.labels(),
        train_codes=write_codes(store, codes, 3),
        reader_rows=train.sample(20_000, 0),
    )
    expected, made = (evaluate(some, CONFIG, seed=0).report for some in (given, streamed))
    sums = {name for name in expected.metrics() if "fd_random" in name}
    for name, value in expected.metrics().items():
        assert made.metrics()[name] == (pytest.approx(value, rel=1e-9) if name in sums else value), name
    assert [m.protocol for m in made.scores()] == [m.protocol for m in expected.scores()]
    assert made.generation.distances == expected.generation.distances
    assert made.generation.confusion == expected.generation.confusion


def test_a_reader_taught_by_some_images_says_so(train) -> None:
    taught = {"train_images": train, "train_labels": train.labels(), "reader_rows": train.sample(300, 0)}
    report = evaluate(dataclasses.replace(digits_inputs(), **taught), CONFIG, seed=0).report
    told = {m.protocol.extractor for m in report.scores() if "class_agreement" in m.name}
    assert len(told) == 1
    assert "trained on 300 real training images" in told.pop()
    assert 0.8 < report.metrics()["real.class_agreement"] < 1
    assert evaluate(dataclasses.replace(digits_inputs(), **taught), CONFIG, seed=0).report == report


def made_artifacts(tmp_path: Path) -> tuple[Made, dict[str, ArtifactRef]]:
    draw_images(tmp_path / "source")
    short = ("evaluate.steps=[1]", "evaluate.sweep.cfg_scales=[]", "encode.micro_batch=8", "decoding.num_steps=1")
    made = Made(Store(tmp_path / "store"), tmp_path / "source", *short)
    torch.manual_seed(0)
    teacher = Teacher(made.job.recipe.teacher.model).requires_grad_(False).eval()
    refs = {"images": made.run(graph.PREPARE), "teacher": published(made.store, teacher)}
    refs["tokenizer"] = made.tokenizer(0)
    refs["codes"] = made.run(graph.ENCODE, images=refs["images"], tokenizer=refs["tokenizer"])
    refs["samples"] = made.run(graph.SAMPLE, generator=made.generator(refs["codes"]))
    return made, refs


def test_the_stage_reads_what_manifests_list(tmp_path) -> None:
    """Files that another run left in the folder are not looked at; those that are listed are, wherever they lie."""
    made, refs = made_artifacts(tmp_path)
    plan = plan_of(graph.EVALUATE, made.job, refs)
    first = run_stage(graph.EVALUATE, Work(made.job, plan, made.store.at("first"), silent))
    assert SWEEP not in {file.path for file in first.files}
    images = folder_of(made.store, "images", refs["images"].digest)
    for name in ("train-00000-of-00001.parquet", "val-00000-of-00001.parquet"):
        images.write(name, b"not finished")
    second = run_stage(graph.EVALUATE, Work(made.job, plan, made.store.at("second"), silent))
    assert second.metrics == first.metrics
    num_codes = manifest_of(made.store, refs["codes"]).counts["rows"]
    work = Work(made.job, plan, made.store.at("third"), silent)
    rows = {split: work.input("codes").rows(split) for split in ("train", "val")}
    assert sum(map(sum, (found.values() for found in rows.values()))) == num_codes
    entry = next(e for e in manifest_of(made.store, refs["images"]).files if split_of(e.path) == "train")
    made.store.delete(key_of(manifest_of(made.store, refs["images"]), entry))
    with pytest.raises((FileNotFoundError, ValueError), match=entry.path):
        run_stage(graph.EVALUATE, work)


def test_the_number_of_images_that_teach_the_reader_is_part_of_what_is_computed(tmp_path) -> None:
    one, other = (
        plan_of(graph.EVALUATE, Made(Store(tmp_path), tmp_path, *overrides).job, {}).digest
        for overrides in ((), ("evaluate.classifier_images=100",))
    )
    assert one != other


# --- memory ----------------------------------------------------------------------------------------------------------


def is_alone(image: torch.Tensor) -> bool:
    """Whether no other images are kept in memory with this one."""
    return image.untyped_storage().nbytes() == image.nbytes


def test_of_decoded_images_that_pass_only_those_shown_stay(monkeypatch) -> None:
    inputs, gallery = digits_inputs(), stage.reconstruction_gallery
    seen = summarize_samples(inputs, RandomFeatures(0, 32), is_read=False, nearest_images=20, shown=samples_shown)
    assert all(map(is_alone, seen.shown.values()))
    shown: list[torch.Tensor] = []

    def drawn(pictures, originals, by_steps, **facts):
        shown.extend(image for images in by_steps.values() for image in images.values())
        return gallery(pictures, originals, by_steps, **facts)

    monkeypatch.setattr(stage, "reconstruction_gallery", drawn)
    evaluate(inputs, CONFIG, seed=0)
    assert shown
    assert all(map(is_alone, shown))


def test_large_networks_look_at_fewer_images_at_once_on_a_gpu() -> None:
    """A micro-batch of 256 images of 256 x 256 would take the teacher some 35 GB, and it is part of codes' names."""
    assert images_at_once("cpu", 256) == 256
    assert images_at_once("cuda", 256) == 64
    assert images_at_once("cuda", 8) == 8


MEASURE = """
import dataclasses, json, resource, sys
import torch
from flows.evaluation.evaluate import evaluate
from flows.evaluation.inputs import StoredCodes
from flows.recipes.schema import EvaluateConfig
from infra.store.store import Store
from sftok.images.lazy import LazyImages
from tests.support.sample_evaluation import digits_inputs
torch.set_num_threads(1)
store, files, rows = Store(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
images = LazyImages(store, {f"images/{n:03d}.parquet": rows for n in range(files)}, 32)
codes = StoredCodes(store, {f"codes/{n:03d}.parquet": rows * 10 for n in range(files)})
inputs = dataclasses.replace(
    digits_inputs(train=100, val=20, samples=40), train_images=images, train_labels=images.labels(), train_codes=codes,
    reader_rows=images.sample(400, 0),
)
evaluate(inputs, EvaluateConfig(steps=(1,), class_reader=True), seed=0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
ROWS = 500  # images a shard; their codes in ten views


def peak(store: Store, files: int) -> float:
    """Peak memory of evaluating with so many training shards, in MB."""
    command = [sys.executable, "-c", MEASURE, store.uri, str(files), str(ROWS)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / 1024


def fill(store: Store, files: int) -> None:
    """Shards of images and of their codes: the same rows under as many names."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    images = []
    for _ in range(ROWS):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, "PNG", compress_level=0)
        images.append({"bytes": file.getvalue(), "path": ""})
    codes = rng.integers(0, CODEBOOK, (ROWS * 10, NUM_TOKENS)).astype(np.uint16)
    for number in range(files):
        ids = [f"{number:03d}/{row:06d}" for row in range(ROWS)]
        table = pa.table({"image_id": ids, "image": images, "label": [row % 10 for row in range(ROWS)]})
        sink = io.BytesIO()
        pq.write_table(table, sink, row_group_size=64)
        store.write(f"images/{number:03d}.parquet", sink.getvalue())
        views = [f"affine-{view}" for view in range(1, 11) for _ in range(ROWS)]
        rows = CodeRows(ids * 10, np.zeros(ROWS * 10, np.int32), views, codes)
        store.write(f"codes/{number:03d}.parquet", to_parquet(INFO, rows))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_training_set(store) -> None:
    """Eight times the images, 14,000 more: 43 MB of them decoded, 344 MB as float64, and 140,000 more rows of codes."""
    fill(store, 32)
    few, many = peak(store, 4), peak(store, 32)
    assert many - few < 30, f"{few:.0f} MB for {4 * ROWS:,} images, {many:.0f} MB for {32 * ROWS:,}"
