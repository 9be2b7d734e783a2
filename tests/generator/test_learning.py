"""A generator beats the unigram baseline: it learns how codes depend on each other."""

import numpy as np
import pytest

from generator.config import GeneratorConfig, GeneratorTrainingConfig
from generator.data import CodeData
from generator.train import train_generator
from infra.codes.contract import CodeRows, load_codes, to_parquet
from infra.store.store import Store
from infra.training.config import OptimizerConfig
from infra.training.loop import TrainingRun
from tests.support.codes_info import codes_info
from tests.support.unigrams import unigram_entropy, unigram_nll

CLASSES, TOKENS, CODES, LEVELS = 4, 8, 64, 8
MARGIN = 0.5  # nats a code
INFO = codes_info(CODES, TOKENS, image_size=64, class_names=tuple("abcd"))


def rows(count: int, seed: int) -> CodeRows:
    """Make codes of class and position, shifted by one of 8 levels that an image's codes share, plus noise.

    Entropy of a code given class and position: ln 8 = 2.08 nats. Given the codes before it, but for the first, it is
    that of the noise: one in ten is of another level, 0.1 ln 10 + 0.9 ln (10 / 9) + 0.1 ln 7 = 0.52 nats.
    """
    random, table = np.random.default_rng(seed), np.random.default_rng(0).integers(0, CODES, (CLASSES, TOKENS))
    classes = random.integers(0, CLASSES, count).astype(np.int32)
    level = random.integers(0, LEVELS, (count, 1)).repeat(TOKENS, 1)
    other = (level + random.integers(1, LEVELS, level.shape)) % LEVELS
    level = np.where(random.random(level.shape) < 0.1, other, level)
    codes = ((table[classes] + 5 * level) % CODES).astype(np.uint16)
    return CodeRows([f"{seed}/{i:05d}" for i in range(count)], classes, ["center"] * count, codes)


@pytest.fixture
def data(store: Store) -> Store:
    names = {"train-00000-of-00002.parquet": (1000, 1), "train-00001-of-00002.parquet": (1000, 2)}
    for name, (count, seed) in (names | {"val-00000-of-00001.parquet": (500, 3)}).items():
        store.write(name, to_parquet(INFO, rows(count, seed)))
    return store


def test_held_out_codes_are_likelier_than_by_class_and_position(data: Store) -> None:
    info, train = load_codes(data, [name for name in data.list() if name.startswith("train")])
    _, held_out = load_codes(data, ["val-00000-of-00001.parquet"])
    entropy = unigram_entropy(held_out, CODES)  # of these very rows: no model of class and position does better
    assert entropy == pytest.approx(np.log(LEVELS), abs=0.05)
    assert unigram_nll(train, held_out, CODES) > entropy
    training = GeneratorTrainingConfig(
        steps=200,
        batch_size=64,
        class_dropout=0.1,
        optimizer=OptimizerConfig(lr=5e-3, end_lr=5e-4, warmup_steps=20, ema_decay=0.95),
    )
    model, run = (
        GeneratorConfig(width=48, layers=2, heads=2, ffn_width=96, dropout=0.0),
        TrainingRun(data.at("made"), seed=0),
    )
    found = train_generator(CodeData.of(train), CodeData.of(held_out), info, model, training, run=run).metrics
    assert found["val_nll"] < entropy - MARGIN
    assert entropy < found["frequency_nll"] < unigram_nll(train, held_out, CODES)  # a better prior, held against too
    assert found["val_nll/0"] == pytest.approx(np.log(LEVELS), abs=0.15)  # nothing tells the first code
    assert found["val_nll/7"] < 1.0  # the others follow from those before them
