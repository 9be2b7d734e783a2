"""On the codes of real digits, a generator learns how codes depend on each other."""

from pathlib import Path

import pytest

from flows.pipeline import graph
from infra.artifacts.manifest import files_of, key_of, manifest_of
from infra.artifacts.shards import split_of
from infra.codes.contract import load_codes
from infra.store.store import Store
from tests.support.small_dataset import Made
from tests.support.unigrams import unigram_nll

MARGIN = 0.5  # nats a code
# A third of what `digits` trains.
SETTINGS = [
    "data.val_fraction=0.2", "data.num_shards=1", "data.num_val_shards=1",
    'encode.variants=["center", "affine-1", "affine-2", "affine-3", "affine-4"]',
    "teacher.training.steps=120", "warm_up.training.steps=200", "align.training.steps=200",
    "train_generator.steps=250", "threads=1",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_held_out_digits_are_likelier_than_by_class_and_position(store: Store) -> None:
    made = Made(store, Path("sklearn:digits"), *SETTINGS)
    images = made.run(graph.PREPARE)
    teacher = made.run(graph.TEACHER, images=images)
    tokenizer = made.run(graph.WARM_UP, images=images, teacher=teacher)
    tokenizer = made.run(graph.ALIGN, images=images, teacher=teacher, tokenizer=tokenizer)
    codes = made.run(graph.ENCODE, images=images, tokenizer=tokenizer)
    generator = made.run(graph.TRAIN_GENERATOR, codes=codes)
    manifest = manifest_of(store, codes)
    keys = {
        split: [key_of(manifest, file) for file in files_of(store, manifest) if split_of(file.path) == split]
        for split in ("train", "val")
    }
    (info, train), (_, held_out) = (load_codes(store, keys[split]) for split in ("train", "val"))
    found = manifest_of(store, generator).metrics["val_nll"]
    assert found < unigram_nll(train, held_out, info.codebook_size) - MARGIN
