import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from infra.store.store import Store
from sftok.config import AugmentConfig, DataConfig
from sftok.images.chunks import decoded_chunks
from sftok.images.dataset import ImageRows, ImageSet, TrainImages, read_labels, variant_images
from sftok.images.preprocess import crop, resize_shorter, ten_crop, to_float, to_rgb
from sftok.prepare.prepare import prepare
from sftok.sources.sources import FolderReader, Source, list_source

CONFIG = DataConfig(image_size=8, val_fraction=0.25, num_shards=3, num_val_shards=2)
STILL = AugmentConfig(crop="center", flip=False)
MOVING = AugmentConfig(crop="center", flip=True, rotate=15, shift=0.1, zoom=0.1)


def pictures(root, count=23):
    """Noise of several shapes, in the files' order of names not that of their hashes."""
    for number in range(count):
        path = root / "abc"[number % 3] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = [(8, 8), (20, 10), (10, 20), (31, 17)][number % 4]
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (*shape, 3), dtype=np.uint8)).save(path)
    return root


@pytest.fixture
def image_set(tmp_path):
    folder = Store(tmp_path / "prepared")
    prepare(list_source(str(pictures(tmp_path / "data"))), CONFIG, out=folder)
    return ImageSet.open(folder)


def rows_of(count: int, size: int = 6) -> ImageRows:
    pixels = np.random.default_rng(count).integers(0, 256, (count, 3, size, size), dtype=np.uint8)
    return ImageRows([f"{number:03d}" for number in range(count)], torch.from_numpy(pixels), torch.arange(count) % 10)


def test_rows_are_the_prepared_images_sorted(image_set, tmp_path):
    assert image_set.class_names == ("a", "b", "c")
    rows = image_set.load("train", 8)
    held_out = image_set.load("val", 8)
    assert rows.image_ids == sorted(rows.image_ids)
    paths = sorted(str(path.relative_to(tmp_path / "data")) for path in (tmp_path / "data").rglob("*.png"))
    assert sorted(rows.image_ids + held_out.image_ids) == paths
    assert rows.images.dtype == torch.uint8
    assert rows.class_ids.dtype == torch.int64
    for image_id, image, class_id in zip(*rows[:3], strict=True):
        decoded = to_rgb((tmp_path / "data" / image_id).read_bytes())
        assert torch.equal(image, crop(resize_shorter(decoded, 8), 8))
        assert "abc"[class_id] == image_id[0]


def test_shards_make_up_the_split(image_set):
    names = image_set.shards("train")
    assert names == [f"train-{index:05d}-of-00003.parquet" for index in range(3)]
    whole = image_set.load("train", 8)
    by_id = dict(zip(whole.image_ids, whole.images, strict=True))
    parts = [image_set.read_shard(name, 8) for name in names]
    assert sorted(image_id for part in parts for image_id in part.image_ids) == whole.image_ids
    for part in parts:
        assert part.image_ids == sorted(part.image_ids)
        assert all(
            torch.equal(by_id[image_id], image) for image_id, image in zip(part.image_ids, part.images, strict=True)
        )


def test_rows_do_not_depend_on_the_number_of_shards(image_set, tmp_path):
    other = Store(tmp_path / "other")
    prepare(list_source(str(tmp_path / "data")), CONFIG.model_copy(update={"num_shards": 1}), out=other)
    one, two = image_set.load("train", 8), ImageSet.open(other).load("train", 8)
    assert one.image_ids == two.image_ids
    assert torch.equal(one.images, two.images)
    assert torch.equal(one.class_ids, two.class_ids)


def test_an_empty_shard_is_a_shard(tmp_path):
    folder = Store(tmp_path / "prepared")
    source = list_source(str(pictures(tmp_path / "data", 6)))
    prepare(source, CONFIG.model_copy(update={"num_shards": 40}), out=folder)
    image_set = ImageSet.open(folder)
    sizes = [len(image_set.read_shard(name, 8).image_ids) for name in image_set.shards("train")]
    assert len(sizes) == 40
    assert 0 in sizes
    assert sum(sizes) == len(image_set.load("train", 8).image_ids)


def test_unlabelled_images_have_class_minus_1(tmp_path):
    root = pictures(tmp_path / "data", 8)
    entries = tuple(entry._replace(class_name=None) for entry in list_source(str(root)).entries)
    folder = Store(tmp_path / "prepared")
    prepare(Source("made up", entries, None, FolderReader(str(root))), CONFIG, out=folder)
    image_set = ImageSet.open(folder)
    assert image_set.class_names is None
    assert set(image_set.load("train", 8).class_ids.tolist()) == {-1}


def test_an_incomplete_set_is_refused(image_set):
    image_set.folder.delete("train-00001-of-00003.parquet")
    with pytest.raises(ValueError, match="2 train shards are no complete set"):
        ImageSet.open(image_set.folder)
    with pytest.raises(ValueError, match="split 'test'"):
        image_set.shards("test")


def test_image_sets_travel_to_workers(image_set):
    copy = pickle.loads(pickle.dumps(image_set))
    name = image_set.shards("val")[0]
    assert torch.equal(copy.read_shard(name, 8).images, image_set.read_shard(name, 8).images)


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_every_image_comes_once_an_epoch(count, batch_size, seed):
    # batches run across the borders of epochs, so nothing is dropped where the count does not divide
    stream = TrainImages(rows_of(count), STILL, seed=seed, batch_size=batch_size)
    steps = -(-3 * count // batch_size)
    served = [image_id for step in range(steps) for image_id in stream.batch(step).image_ids]
    for epoch in range(3):
        assert sorted(served[epoch * count : (epoch + 1) * count]) == rows_of(count).image_ids


def test_batches_hold_the_pixels_and_classes_of_their_ids():
    rows = rows_of(30)
    batch = TrainImages(rows, STILL, seed=0, batch_size=8).batch(5)
    assert batch.images.dtype == torch.float32
    for image_id, image, class_id in zip(batch.image_ids, batch.images, batch.class_ids, strict=True):
        assert torch.equal(image, to_float(rows.images[int(image_id)]))
        assert class_id == rows.class_ids[int(image_id)]


def test_a_batch_is_a_function_of_seed_and_step():
    first, again = (TrainImages(rows_of(30), MOVING, seed=3, batch_size=8) for _ in range(2))
    forwards = [first.batch(step) for step in range(12)]
    torch.manual_seed(99)  # the global generator must not matter
    for step in reversed(range(12)):
        batch = again.batch(step)
        assert batch.image_ids == forwards[step].image_ids
        assert torch.equal(batch.images, forwards[step].images)
    assert TrainImages(rows_of(30), MOVING, seed=4, batch_size=8).batch(0).image_ids != forwards[0].image_ids


def test_epochs_differ_in_order_and_in_changes():
    stream = TrainImages(rows_of(16), MOVING, seed=0, batch_size=16)
    one, two = stream.batch(0), stream.batch(1)
    assert one.image_ids != two.image_ids
    row = two.image_ids.index(one.image_ids[0])
    assert not torch.equal(one.images[0], two.images[row])


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_ranks_divide_the_same_batch(ranks):
    stream = TrainImages(rows_of(30), MOVING, seed=0, batch_size=8)
    for step in (0, 3, 7):
        parts = [stream.batch(step, rank=rank, ranks=ranks) for rank in range(ranks)]
        whole = stream.batch(step)
        assert [image_id for part in parts for image_id in part.image_ids] == whole.image_ids
        assert torch.equal(torch.cat([part.images for part in parts]), whole.images)


def test_ranks_must_divide_the_batch():
    with pytest.raises(ValueError, match="batch_size = 8 does not divide by 3 ranks"):
        TrainImages(rows_of(30), STILL, seed=0, batch_size=8).batch(0, ranks=3)


def test_random_crops_reach_all_of_a_long_image(image_set):
    with pytest.raises(ValueError, match='loaded with crop="random"'):
        TrainImages(image_set.load("train", 8), AugmentConfig(flip=False), seed=0, batch_size=4)
    rows = image_set.load("train", 8, crop="random")
    assert torch.equal(rows.images, image_set.load("train", 8).images)
    stream = TrainImages(rows, AugmentConfig(flip=False), seed=0, batch_size=len(rows.image_ids))
    seen: dict[str, set[int]] = {image_id: set() for image_id in rows.image_ids}
    for step in range(150):
        batch = stream.batch(step)
        for image_id, image in zip(batch.image_ids, batch.images, strict=True):
            whole = to_float(rows.uncropped[rows.image_ids.index(image_id)])
            length = max(whole.shape[1:]) - 8
            wide = whole if whole.shape[2] > 8 else whole.transpose(1, 2)
            cut = image if whole.shape[2] > 8 else image.transpose(1, 2)
            at = [left for left in range(length + 1) if torch.equal(wide[:, :, left : left + 8], cut)]
            assert at, "not a crop of its image"
            seen[image_id].add(at[0])
    for image_id, whole in zip(rows.image_ids, rows.uncropped, strict=True):
        assert seen[image_id] == set(range(max(whole.shape[1:]) - 7))


def test_no_training_images_are_refused():
    with pytest.raises(ValueError, match="no training images"):
        TrainImages(rows_of(0), STILL, seed=0, batch_size=4)


def test_variants_are_what_they_are_called():
    rows = rows_of(9)
    center = variant_images(rows, "center", STILL)
    assert center.dtype == torch.float32
    assert torch.equal(center, to_float(rows.images))
    assert torch.equal(variant_images(rows, "flip", STILL), center.flip(-1))
    views = [variant_images(rows, f"affine-{k}", MOVING) for k in range(1, 4)]
    for view in views:
        assert view.min() >= 0
        assert view.max() <= 1
        assert (view - center).abs().amax((1, 2, 3)).min() > 0.02
    assert not torch.equal(views[0], views[1])
    # an affine view keeps the side of the class even where training images are mirrored
    unmirrored = MOVING.model_copy(update={"flip": False})
    assert torch.equal(variant_images(rows, "affine-1", unmirrored), views[0])


@given(st.permutations(range(11)), st.integers(1, 11), st.sampled_from(["center", "flip", "affine-1", "affine-7"]))
@settings(max_examples=40, deadline=None)
def test_variants_do_not_depend_on_batch_mates(order, batch, name):
    rows = rows_of(11, size=32)
    expected = variant_images(rows, name, MOVING)
    for start in range(0, 11, batch):
        part = list(order[start : start + batch])
        some = ImageRows([rows.image_ids[row] for row in part], rows.images[part], rows.class_ids[part])
        assert torch.equal(variant_images(some, name, MOVING), expected[part])


def test_variants_do_not_depend_on_threads():
    rows, before = rows_of(16, size=32), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = variant_images(rows, "affine-1", MOVING)
        torch.set_num_threads(2)
        assert torch.equal(variant_images(rows, "affine-1", MOVING), one)
    finally:
        torch.set_num_threads(before)


def test_an_affine_view_that_changes_nothing_is_refused():
    with pytest.raises(ValueError, match=r"'affine-1' would equal center: set augment.rotate"):
        variant_images(rows_of(2), "affine-1", STILL)
    with pytest.raises(ValueError, match="'ten_crop' is not known"):
        variant_images(rows_of(2), "ten_crop", MOVING)


def test_crops_are_of_the_larger_square_and_change_no_other_view(image_set, tmp_path):
    name = image_set.shards("train")[0]
    plain = [chunk.rows for chunk in decoded_chunks(image_set.folder, name, 8, 3)]
    larger = [chunk.rows for chunk in decoded_chunks(image_set.folder, name, 8, 3, larger_size=11)]
    assert [rows.image_ids for rows in larger] == [rows.image_ids for rows in plain]
    for one, two in zip(plain, larger, strict=True):
        for view in ("center", "flip", "affine-1"):
            assert torch.equal(variant_images(one, view, MOVING), variant_images(two, view, MOVING))
        for number in range(1, 11):
            views = variant_images(two, f"crop-{number}", STILL)
            for image_id, view in zip(two.image_ids, views, strict=True):
                image = to_rgb((tmp_path / "data" / image_id).read_bytes())
                square = crop(resize_shorter(image, 11), 11)
                assert torch.equal(view, to_float(ten_crop(square, 8, number)))
    with pytest.raises(ValueError, match="'crop-3' is cut from a larger square"):
        variant_images(plain[0], "crop-3", STILL)


def test_labels_are_read_without_images(image_set):
    name = image_set.shards("train")[0]
    rows = image_set.read_shard(name, 8)
    read = list(read_labels(image_set.folder, name))
    assert [image_id for part in read for image_id in part.image_ids] == rows.image_ids
    assert [class_id for part in read for class_id in part.class_ids] == rows.class_ids.tolist()


@pytest.mark.s3
def test_s3_holds_the_same_files(tmp_path, s3_store):
    source, local = list_source(str(pictures(tmp_path / "data"))), Store(tmp_path / "prepared")
    prepared = prepare(source, CONFIG, out=local)
    assert prepare(source, CONFIG, out=s3_store) == prepared
    assert prepare(source, CONFIG, out=s3_store) == prepared, "read back from finished shards"
    assert {name: s3_store.read(name) for name in s3_store.list()} == {name: local.read(name) for name in local.list()}
    one, two = (ImageSet.open(folder).load("train", 8) for folder in (local, s3_store))
    assert one.image_ids == two.image_ids
    assert torch.equal(one.images, two.images)


def test_digits_end_to_end(tmp_path):
    folder = Store(tmp_path)
    prepared = prepare(list_source("sklearn:digits"), DataConfig(image_size=32, val_fraction=0.2), out=folder)
    assert prepared.counts["accepted"] == 1797
    rows = ImageSet.open(folder).load("val", 32)
    assert len(rows.image_ids) == prepared.counts["val"]
    assert rows.images.shape[1:] == (3, 32, 32)
    assert rows.images.amax((1, 2, 3)).min() > 200, "a digit is white on black"
    assert set(rows.class_ids.tolist()) == set(range(10))
