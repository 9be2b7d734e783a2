"""The sweep of the evaluate stage, on real artifacts of toy size: rows, its second generator, what holds no times."""

import json
from pathlib import Path

import pytest
import torch

from flows.evaluation.sweep import SECONDS, SWEEP, read_sweep, sweep
from flows.make import make
from flows.pipeline import graph
from flows.recipes.files import load_recipe
from flows.recipes.schema import SweepConfig
from flows.stage import Work, plan_of
from generator.config import GENERATORS
from infra.artifacts.manifest import ArtifactPlan, ArtifactRef, folder_of
from infra.progress import silent
from infra.store.store import Store
from sftok.images.lazy import LazyImages
from sftok.metrics.class_reader import ClassReader
from sftok.model.teacher import Teacher
from sftok.weights.artifacts import save_teacher
from tests.support.small_dataset import Made, Result, draw_images

SETTINGS = [
    "evaluate.sweep.cfg_scales=[1.0, 3.0]", "evaluate.sweep.temperatures=[1.0, 0.5]",
    "evaluate.sweep.masked_temperatures=[2.0]", "evaluate.sweep.per_class=3",
    "evaluate.sweep.generator.width=16", "evaluate.sweep.generator.layers=1", "evaluate.sweep.generator.heads=2",
    "evaluate.sweep.generator.ffn_width=16", "evaluate.sweep.train_generator.steps=2",
    "evaluate.sweep.train_generator.batch_size=4", "evaluate.sweep.train_generator.optimizer.warmup_steps=1",
    "generator.width=32", "generator.layers=1", "generator.heads=2", "generator.ffn_width=32", "threads=1",
]  # fmt: skip


class Stage:
    """An evaluate stage whose inputs are there."""

    def __init__(self, store: Store, source: Path) -> None:
        draw_images(source)
        self.made = Made(store, source, *SETTINGS)
        recipe = self.made.job.recipe
        torch.manual_seed(0)
        plan = ArtifactPlan(kind="teacher", version=1, config={})
        files = save_teacher(Teacher(recipe.teacher.model), folder_of(store, plan.kind, plan.digest))
        images, tokenizer = self.made.run(graph.PREPARE), self.made.tokenizer(1)
        codes = self.made.run(graph.ENCODE, images=images, tokenizer=tokenizer)
        self.inputs: dict[str, ArtifactRef] = {
            "images": images,
            "teacher": self.made.publish(plan, Result(files, {}, {})),
            "tokenizer": tokenizer,
            "codes": codes,
            "samples": self.made.run(graph.SAMPLE, generator=self.made.generator(codes)),
            "second_generator": self.made.run(graph.TRAIN_SECOND_GENERATOR, codes=codes),
        }
        self.plan = plan_of(graph.EVALUATE, self.made.job, self.inputs)

    def sweep(self, out: Store) -> Result:
        work = Work(self.made.job, self.plan, out, silent)
        train = LazyImages(self.made.store, work.input("images").rows("train"), work.recipe.data.image_size).load()
        return Result([sweep(work, ClassReader.fit(train.images, train.class_ids))], {}, {})


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    folder = tmp_path_factory.mktemp("sweep")
    return Stage(Store(folder / "store"), folder / "images")


@pytest.fixture(scope="module")
def swept(stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Result]:
    out = Store(tmp_path_factory.mktemp("out"))
    return out, stage.sweep(out)


class Evaluation:
    """As much of a manifest as is read."""

    def __init__(self, result: Result) -> None:
        self.files = result.files


def test_every_setting_of_both_generators_has_a_row(swept: tuple[Store, Result]) -> None:
    out, result = swept
    rows = read_sweep(out, Evaluation(result))
    settings = [(row.generator, row.temperature, row.cfg_scale) for row in rows]
    assert settings == [
        *(("autoregressive", temperature, scale) for temperature in (1.0, 0.5) for scale in (1.0, 3.0)),
        *(("masked", 2.0, scale) for scale in (1.0, 3.0)),
    ]
    assert {row.samples for row in rows} == {6}
    assert all(row.seconds_per_image > 0 for row in rows)
    assert all(round(6 * row.class_accuracy, 6).is_integer() for row in rows)


def test_the_artifact_holds_no_times(stage: Stage, swept: tuple[Store, Result], tmp_path: Path) -> None:
    again = stage.sweep(Store(tmp_path))
    assert again.files == swept[1].files
    assert b"seconds" not in Store(tmp_path).read(SWEEP)
    Store(tmp_path).delete(SECONDS)
    assert {row.seconds_per_image for row in read_sweep(Store(tmp_path), Evaluation(again))} == {None}


def test_the_second_generator_is_what_a_recipe_of_its_own_would_train(stage: Stage) -> None:
    """A run with that generator finds it; here, `digits` beside `digits_maskgit`."""
    digits, masked = load_recipe("digits"), load_recipe("digits_maskgit")
    second = digits.evaluate.sweep
    assert second.generator == masked.generator
    assert second.train_generator == masked.train_generator
    assert masked.evaluate.sweep.generator == digits.generator == GENERATORS["toy"]
    job, codes = stage.made.job, {"codes": stage.inputs["codes"]}
    recipe = job.recipe.model_copy(
        update={
            "generator": job.recipe.evaluate.sweep.generator,
            "train_generator": job.recipe.evaluate.sweep.train_generator,
        }
    )
    made, state = make(graph.TRAIN_GENERATOR, job._replace(recipe=recipe), codes)
    assert (made.ref, state) == (stage.inputs["second_generator"], "Cached")
    assert made.manifest.config["generator"]["kind"] == "masked"


def test_an_evaluation_without_a_sweep_has_no_rows(tmp_path: Path) -> None:
    assert read_sweep(Store(tmp_path), Evaluation(Result([], {}, {}))) == ()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluate.class_reader=false", r"evaluate: sweep\.cfg_scales needs the class reader"),
        (
            "evaluate.sweep.temperatures=[0.0]",
            r"evaluate\.sweep\.temperatures\.0 = 0\.0: input should be greater than 0",
        ),
        ("evaluate.sweep.cfg_scales=[-1.0]", r"evaluate\.sweep\.cfg_scales\.0 = -1\.0: input should be greater"),
        ("evaluate.sweep.masked_temperatures=[]", r"evaluate\.sweep: temperatures and masked_temperatures need"),
    ],
)
def test_sweeps_that_cannot_be_are_refused_when_read(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe("digits", overrides=[override])


def test_a_second_generator_needs_its_training() -> None:
    with pytest.raises(ValueError, match="give both, or neither"):
        SweepConfig(generator=GENERATORS["toy"])


def test_points_are_plain_json(swept: tuple[Store, Result]) -> None:
    points = json.loads(swept[0].read(SWEEP))
    assert set(points[0]) == {"generator", "cfg_scale", "temperature", "samples", "class_accuracy"}
