"""Real artifacts at toy size, made by the stages: images, tokenizers, their codes, a generator, its samples."""

from pathlib import Path

import torch
from PIL import Image

from flows.make import find_or_publish, make
from flows.recipes.files import load_recipe
from flows.stage import Result, Stage, StageJob
from generator.artifacts import save_generator
from generator.autoregressive import Generator
from generator.config import GeneratorConfig
from generator.data import space_of
from infra.artifacts.manifest import ArtifactPlan, ArtifactRef, folder_of, manifest_of
from infra.codes.contract import load_info
from infra.compute.workers import WorkerOptions
from infra.store.store import Store
from sftok.model.teacher import Teacher
from sftok.model.tokenizer import SFTok
from sftok.weights.artifacts import save_teacher, save_tokenizer

SETTINGS = ["data.num_shards=3", "data.num_val_shards=2", "data.val_fraction=0.3", "sample.per_class=3"]
SETTINGS += ['encode.variants=["center", "affine-1"]', "sample.samples_per_shard=4"]
SIZE = 32


def draw_images(folder: Path, count: int = 20) -> None:
    """Noise in two classes, and two files that are no images."""
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        pixels = torch.randint(0, 256, (SIZE, SIZE, 3), generator=generator, dtype=torch.uint8)
        path = folder / "ab"[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).save(path)
    for name in ("broken.png", "empty.png"):
        (folder / "a" / name).write_bytes(b"no image"[: 8 * (name == "broken.png")])


class Made:
    """A store whose artifacts were made by the stages' own code; models have random weights."""

    def __init__(self, store: Store, source: Path, *overrides: str) -> None:
        self.store = store
        recipe = load_recipe("digits", overrides=[*SETTINGS, *overrides])
        self.job = StageJob(recipe, store, str(source), WorkerOptions())

    def run(self, stage: Stage, **inputs: ArtifactRef) -> ArtifactRef:
        """Make and publish what a stage makes."""
        return make(stage, self.job, inputs)[0].ref

    def tokenizer(self, seed: int) -> ArtifactRef:
        """A tokenizer with random weights."""
        recipe = self.job.recipe
        torch.manual_seed(seed)
        model = SFTok(recipe.tokenizer, recipe.teacher.model, recipe.data.image_size, pixels=False)
        model.initialise()
        plan = ArtifactPlan(kind="tokenizer", version=1, config={"seed": seed})
        return self.publish(plan, Result(save_tokenizer(model, folder_of(self.store, plan.kind, plan.digest)), {}, {}))

    def teacher(self) -> ArtifactRef:
        """A teacher with random weights."""
        torch.manual_seed(0)
        plan = ArtifactPlan(kind="teacher", version=1, config={})
        files = save_teacher(Teacher(self.job.recipe.teacher.model), folder_of(self.store, plan.kind, plan.digest))
        return self.publish(plan, Result(files, {}, {}))

    def generator(self, codes: ArtifactRef) -> ArtifactRef:
        """A generator with random weights, as if trained on `codes`."""
        folder = folder_of(self.store, codes.kind, codes.digest)
        info = load_info(folder, next(e.path for e in manifest_of(self.store, codes).files if "train-" in e.path))
        torch.manual_seed(0)
        config = self.job.recipe.generator
        assert isinstance(config, GeneratorConfig)
        model = Generator(config, space_of(info))
        model.initialise()
        plan = ArtifactPlan(kind="generator", version=1, config={}, inputs={"codes": codes})
        out = folder_of(self.store, plan.kind, plan.digest)
        return self.publish(plan, Result(save_generator(model, info, out), {}, {}))

    def publish(self, plan: ArtifactPlan, result: Result) -> ArtifactRef:
        """Mark as finished."""
        return find_or_publish(self.store, plan, lambda _: result)[0].ref
