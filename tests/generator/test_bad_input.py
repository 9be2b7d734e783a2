"""Invalid input to a generator is rejected in one line that names it; nothing is clipped, skipped or guessed."""

import io
from collections.abc import Callable

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from flows.recipes.files import load_recipe
from generator.artifacts import load_generator, save_generator
from generator.config import GeneratorConfig, GeneratorTrainingConfig, SampleConfig
from generator.data import CodeData, TrainCodes, space_of
from generator.kinds import prepare_sampler
from generator.samples import SampleJob, generate, plan_shards
from generator.sampling.prepared import PackedGenerator
from generator.train import train_generator
from infra.codes.contract import CodeRows, CodesInfo, load_codes, to_parquet
from infra.compute.workers import WorkerOptions
from infra.store.store import Store
from infra.training.config import OptimizerConfig
from infra.training.loop import TrainingRun
from tests.support.plain_sampling import sample
from tests.support.small_generators import INFO, SPACE, autoregressive, masked, uniform

TRAINING = GeneratorTrainingConfig(steps=1, batch_size=4, optimizer=OptimizerConfig(warmup_steps=1))
MODEL = GeneratorConfig(width=16, layers=1, heads=2, ffn_width=16)
NAMES = ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]


def rows(count: int = 8, *, start: int = 0, classes: int | None = None, top: int = 11) -> CodeRows:
    random = np.random.default_rng(0)
    class_id = np.arange(count, dtype=np.int32) % 3 if classes is None else np.full(count, classes, np.int32)
    codes = random.integers(0, top, (count, 6)).astype(np.uint16)
    return CodeRows([f"{start + i:03d}" for i in range(count)], class_id, ["center"] * count, codes)


def refused(call: Callable[[], object]) -> str:
    """Return the message of the error, which must be one line."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the callers look at what is said
        call()
    said = str(caught.value)
    assert "\n" not in said
    return said


def train(data: CodeRows, val: CodeRows, store: Store, info: CodesInfo = INFO) -> object:
    return train_generator(CodeData.of(data), CodeData.of(val), info, MODEL, TRAINING, run=TrainingRun(store, seed=0))


# --- code files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["cut", "flipped", "no parquet"])
def test_damaged_shards(store: Store, damage: str) -> None:
    whole = to_parquet(INFO, rows())
    store.write(NAMES[0], whole)
    broken = {"cut": whole[:-50], "flipped": whole[:60] + bytes(200) + whole[260:], "no parquet": b"hello"}[damage]
    store.write(NAMES[1], broken)
    assert NAMES[1] in refused(lambda: load_codes(store, NAMES))


def test_shards_of_two_tokenizers(store: Store) -> None:
    store.write(NAMES[0], to_parquet(INFO, rows()))
    store.write(NAMES[1], to_parquet(INFO.model_copy(update={"tokenizer": "other"}), rows(start=8)))
    said = refused(lambda: load_codes(store, NAMES))
    assert "tokenizer is 't' in" in said
    assert "'other'" in said
    assert "do not mix" in said


def test_codes_beyond_the_codebook(store: Store) -> None:
    """As from a writer that does not check: the file states 11 codes and holds 16."""
    wide = INFO.model_copy(update={"codebook_size": 16})
    table = pq.read_table(io.BytesIO(to_parquet(wide, rows(top=16))))
    file = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({b"sftok": INFO.model_dump_json().encode()}), file)
    store.write(NAMES[0], file.getvalue())
    assert "are not within codebook_size = 11" in refused(lambda: load_codes(store, NAMES[:1]))


# --- training --------------------------------------------------------------------------------------------------------


def test_codes_in_memory_beyond_the_codebook(store: Store) -> None:
    assert "code 1" in refused(lambda: train(rows(top=16), rows(), store))
    assert "held-out codes: code 1" in refused(lambda: train(rows(), rows(top=16), store))


def test_codes_of_another_length(store: Store) -> None:
    short = rows()._replace(codes=rows().codes[:, :5])
    assert "(rows, 6)" in refused(lambda: train(short, rows(), store))


def test_labels_beyond_the_classes(store: Store) -> None:
    said = refused(lambda: train(rows(classes=3), rows(), store))
    assert "class id 3 is not among 3 classes" in said
    assert "held-out" in refused(lambda: train(rows(), rows(classes=7), store))


def test_no_labels_where_there_are_classes(store: Store) -> None:
    """A conditional generator would learn only the null class, and samples of every class would be arbitrary."""
    said = refused(lambda: train(rows(classes=-1), rows(), store))
    assert "class_names" in said
    assert "no row has a label" in said


def test_no_training_rows(store: Store) -> None:
    assert "no training rows" in refused(lambda: train(rows(0), rows(), store))
    assert "no held-out rows" in refused(lambda: train(rows(), rows(0), store))


def test_rows_without_a_class_among_others_are_of_the_null_class(store: Store) -> None:
    """Not an error, since some images may have no label."""
    mixed = rows()
    mixed.class_id[::2] = -1
    train(mixed, rows(), store)
    stream = TrainCodes(CodeData.of(mixed), space_of(INFO), seed=0, batch_size=8, class_dropout=0.0)
    assert (stream.batch(0).classes == 3).sum() == 4


# --- sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [(3,), (-1,), (0, 99)])
def test_classes_that_are_not_there(classes: tuple[int, ...]) -> None:
    said = refused(lambda: plan_shards(SPACE, SampleConfig(), classes))
    assert f"class id {classes[-1]} is not among 3 classes" in said


@pytest.mark.parametrize("class_id", [-1, 4])
def test_class_ids_given_to_a_sampler(class_id: int) -> None:
    for model, numbers in ((autoregressive(), (6,)), (masked(), (8, 2, 6))):
        sampler = prepare_sampler(model, SampleConfig())
        said = refused(lambda s=sampler, n=numbers: s(torch.tensor([0, class_id]), uniform(2, *n)))
        assert f"class id {class_id} is not in [0, 3]" in said


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("top_p", 0.0), ("top_p", 1.5), ("top_k", -1), ("temperature", -0.5), ("cfg_scale", -1.0), ("num_steps", 0),
        ("per_class", 0), ("micro_batch", -1), ("cfg_power", 0.0), ("annealing", (0.0, 1.0)),
    ],
)  # fmt: skip
def test_settings_that_mean_nothing(setting: str, value: object) -> None:
    with pytest.raises(ValueError, match=setting):
        SampleConfig.model_validate({setting: value})


@pytest.mark.parametrize(("setting", "value"), [("top_p", 0.0), ("temperature", -0.5), ("top_k", -2)])
def test_settings_that_were_not_checked_are_refused_by_the_draw(setting: str, value: float) -> None:
    config = SampleConfig().model_copy(update={setting: value})  # a copy is not validated
    said = refused(lambda: sample(autoregressive(), torch.tensor([0]), uniform(1, 6), config))
    assert f"{setting} = {value}" in said


@pytest.mark.parametrize("packed", [False, True])
def test_a_cache_that_is_too_short(packed: bool) -> None:
    """The cache is for fewer sequences, or fewer codes."""
    models = [autoregressive(), autoregressive(SPACE._replace(num_tokens=4))]
    steps, short = [PackedGenerator(model, torch.float32) if packed else model for model in models]
    x_BW = models[0].class_embed(torch.tensor([0, 1]))
    for cache in (steps.empty_cache(1), short.empty_cache(2)):
        assert "empty_cache(2)" in refused(lambda cache=cache: steps.step(x_BW, torch.tensor(0), cache))


def test_a_shard_of_samples_that_was_damaged(store: Store) -> None:
    """A shard whose sidecar is empty or belongs to another is not considered finished."""
    save_generator(autoregressive(), INFO, store.at("generator"))
    job = SampleJob(store.at("generator"), store.at("out"), SampleConfig(per_class=2, micro_batch=3), 0, "g")
    (entry,) = generate(job, options=WorkerOptions())
    for sidecar in (b"{", entry.model_copy(update={"path": "other.parquet"}).model_dump_json().encode()):
        job.out.write(f"{entry.path}.json", sidecar)
        said = refused(lambda: generate(job, options=WorkerOptions()))
        assert entry.path in said
        assert "delete" in said


def test_weights_that_are_not_finite(store: Store) -> None:
    """Otherwise every code would be drawn as 0."""
    model = autoregressive()
    with torch.no_grad():
        model.norm_out.weight[3] = torch.nan
    save_generator(model, INFO, store)
    assert "norm_out.weight has values that are not finite" in refused(lambda: load_generator(store))


@pytest.mark.parametrize(
    ("setting", "value"), [("cfg_scale", float("inf")), ("cfg_scale", 1e9), ("temperature", 1e-40)]
)
def test_settings_that_would_draw_nothing_but_the_first_code(setting: str, value: float) -> None:
    with pytest.raises(ValueError, match=setting):
        SampleConfig.model_validate({setting: value})


@pytest.mark.parametrize(
    ("recipe", "setting"), [("digits_maskgit", "sample.top_k=5"), ("digits", "sample.num_steps=4")]
)
def test_settings_of_the_other_kind_are_refused_before_anything_is_trained(recipe: str, setting: str) -> None:
    said = refused(lambda: load_recipe(recipe, overrides=[setting]))
    assert f"{setting.split('.')[1].replace('=', ' = ')} has no effect on a generator that is" in said
