"""Recipes of published models are what was published: sizes, schedules, and which parameters decay."""

import re
from pathlib import Path

import pytest
import torch

from flows.pipeline import graph
from flows.pipeline.graph import GRAPH
from flows.recipes.files import load_recipe
from flows.recipes.registry import RECIPES
from flows.recipes.schema import Recipe
from flows.requests.checks import check_ranks, check_share, check_weights, trainings_of
from flows.stage import StageJob, plan_of
from generator.code_space import CodeSpace
from generator.flops import training_flops
from generator.kinds import build_generator
from infra.compute.rank_count import RankCount
from infra.compute.workers import WorkerOptions
from infra.store.store import Store
from infra.training.learner import decay_matrices
from sftok.model.tokenizer import SFTok
from tests.support.small_dataset import draw_images

MILLION = 1e6
# method.md 1.1: encoder, decoder and all of stage 3, in millions.
PUBLISHED = {"imagenet256_sftok_b": (85.92, 88.87, 205.85), "imagenet256_sftok_l": (85.92, 307.92, 424.90)}
WEIGHTS = "0" * 64


def on_meta(recipe: Recipe) -> SFTok:
    with torch.device("meta"):
        return SFTok(recipe.tokenizer, recipe.teacher.model, recipe.data.image_size, pixels=True)


def millions(module: torch.nn.Module) -> float:
    return sum(p.numel() for p in module.parameters()) / MILLION


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    model = on_meta(RECIPES[name]())
    encoder, decoder, whole = PUBLISHED[name]
    latents = model.encoder.latent_tokens.numel() / MILLION  # counted beside the encoder in the published layout
    assert millions(model.encoder) - latents == pytest.approx(encoder, abs=0.006)
    assert millions(model.decoder) == pytest.approx(decoder, abs=0.006)
    assert millions(model) == pytest.approx(whole, abs=0.006)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_parameter_decays_or_does_not(name: str) -> None:
    model = on_meta(RECIPES[name]())
    decayed = {n for n, p in model.named_parameters() if decay_matrices(n, p)}
    plain = {n for n, p in model.named_parameters() if not decay_matrices(n, p)}
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    assert sum(sizes[n] for n in decayed) + sum(sizes[n] for n in plain) == sum(sizes.values())
    for name_ in plain:
        words = ("bias", "norm", "embed", "token", "positions", "codebook")
        assert any(word in name_ for word in words), name_
    assert "encoder.patch_embed.weight" in plain  # as published: names with "embed" do not decay
    assert "decoder.latent_embed.weight" in plain
    assert "quantizer.embedding" in plain
    assert "quantizer.shared_linear.weight" in decayed
    assert "encoder.transformer.blocks.0.attention.qkv.weight" in decayed
    assert "pixel_decoder.conv_in.weight" in decayed


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_schedule_is_the_published_one(name: str) -> None:
    recipe = RECIPES[name]()
    steps = [stage.training.steps for stage in (recipe.warm_up, recipe.align, recipe.fine_tune)]
    assert steps == [200_000, 800_000, 1_000_000]
    assert [s.training.batch_size for s in (recipe.warm_up, recipe.align, recipe.fine_tune)] == [256, 256, 128]
    assert recipe.fine_tune.training.micro_batches == 16  # eight GPUs, two each
    assert recipe.align.replace_prob == 1.0
    check_ranks(recipe, RankCount(8, 8))
    with pytest.raises(ValueError, match=r"warm_up.training: 8 micro-batches a step cannot be shared by --ranks 3"):
        check_ranks(recipe, RankCount(3, 3))


def test_a_range_of_ranks_is_refused_only_where_some_would_have_nothing_to_do() -> None:
    recipe = RECIPES["imagenet256_sftok_b"]()
    check_ranks(recipe, RankCount(3, 8))
    with pytest.raises(
        ValueError, match=r"warm_up.training: 8 micro-batches a step cannot be shared by --ranks 3:9: set"
    ):
        check_ranks(recipe, RankCount(3, 9))


@pytest.mark.parametrize("ranks", ["2", "3", "7", "3:9", "2:64", "1:1000"])
@pytest.mark.parametrize("name", ["digits", "digits_tiny", "imagenet256_sftok_b"])
def test_each_remedy_for_a_number_of_ranks_is_one(name: str, ranks: str) -> None:
    for stage, training in trainings_of(load_recipe(name), tuple(GRAPH)).items():
        asked = RankCount.parse(ranks)
        try:
            check_share(stage, training, asked)
        except ValueError as error:
            text = str(error)
        else:
            continue
        if cut := re.search(rf"set {re.escape(stage)}\.micro_batch=(\d+), or", text):
            check_share(stage, training.model_copy(update={"micro_batch": int(cut[1])}), asked)
        else:
            assert training.batch_size % asked.most
            assert not asked.is_elastic or training.batch_size < asked.most
        counts = [int(count) for count in re.findall(r"\d+", text.partition("--ranks to ")[2])]
        assert counts
        for count in counts:
            check_share(stage, training, RankCount(1 if asked.is_elastic else count, count))


def test_shards_by_machine_take_no_range_of_ranks() -> None:
    recipe = load_recipe("imagenet256_ar_xl", overrides=["train_generator.parallel=hsdp"])
    check_ranks(recipe, RankCount(8, 8), ["train_generator"])
    with pytest.raises(ValueError, match=r"set train_generator\.parallel=fsdp$"):
        check_ranks(recipe, RankCount(2, 4), ["train_generator"])


def test_ranks_share_the_second_generators_batches_too() -> None:
    parts = [f"{name}.micro_batch=32" for name in ("train_generator", "evaluate.sweep.train_generator")]
    stages = ("train_generator", "train_second_generator")
    two = RankCount(2, 2)
    check_ranks(load_recipe("digits", overrides=parts), two, stages)
    with pytest.raises(ValueError, match=r"evaluate\.sweep\.train_generator: 1 micro-batch a step cannot be shared"):
        check_ranks(load_recipe("digits", overrides=parts[:1]), two, stages)
    check_ranks(load_recipe("digits", overrides=[*parts[:1], "evaluate.sweep.cfg_scales=[]"]), two, stages)


# Millions of parameters before the norms of queries and keys, which are twice a head's width a block; billions of
# operations a row.
GENERATORS = {
    "imagenet256_ar_b": ("autoregressive", 98.3, 12, 35.5),
    "imagenet256_ar_l": ("autoregressive", 326.1, 24, 122.8),
    "imagenet256_ar_xl": ("autoregressive", 753.7, 36, 287.1),
    "imagenet256_ar_xxl": ("autoregressive", 1385.8, 48, 530.3),
    "imagenet256_ar_3b": ("autoregressive", 3044.2, 24, 1161.4),
    "imagenet256_maskgit": ("masked", 183.5, 24, 69.6),
}
STAGES_TO_CODES = (graph.PREPARE, graph.TEACHER, graph.WARM_UP, graph.ALIGN, graph.FINE_TUNE, graph.ENCODE)


@pytest.mark.parametrize("name", GENERATORS)
def test_generators_have_the_stated_sizes(name: str) -> None:
    kind, size, layers, operations = GENERATORS[name]
    recipe = RECIPES[name]()
    assert (recipe.generator.kind, recipe.generator.layers) == (kind, layers)
    space = CodeSpace(recipe.tokenizer.codebook_size, recipe.tokenizer.num_latent_tokens, 1000)
    with torch.device("meta"):
        model = build_generator(recipe.generator, space)
    norms = sum(p.numel() for n, p in model.named_parameters() if "q_norm" in n or "k_norm" in n)
    head = recipe.generator.width // recipe.generator.heads
    assert norms == (layers * 2 * head if kind == "autoregressive" else 0)
    assert millions(model) - norms / MILLION == pytest.approx(size, abs=0.05)
    assert training_flops(recipe.generator, space) / 1e9 == pytest.approx(operations, abs=0.05)
    for ranks in (1, 4, 8):
        check_ranks(recipe, RankCount(ranks, ranks))


def test_the_masked_recipe_is_the_published_one() -> None:
    recipe = RECIPES["imagenet256_maskgit"]()
    training, optimizer, sample = recipe.train_generator, recipe.train_generator.optimizer, recipe.sample
    assert (training.steps, training.batch_size, training.precision) == (1_000_000, 1024, "bf16")
    assert (training.label_smoothing, training.class_dropout, recipe.generator.unmasked_weight) == (0.1, 0.1, 0.1)
    assert (optimizer.lr, optimizer.end_lr, optimizer.warmup_steps) == (2e-4, 1e-5, 10_000)
    assert (optimizer.betas, optimizer.weight_decay, optimizer.grad_clip, optimizer.ema_decay) == (
        (0.9, 0.96), 0.03, 1.0, 0.999,
    )  # fmt: skip
    assert (sample.num_steps, sample.temperature, sample.cfg_schedule) == (8, 1.0, "constant")
    assert sample.cfg_scale == 4.5 + 1  # the published convention adds to the conditional logits
    sample.fit(recipe.generator)


@pytest.mark.parametrize("name", GENERATORS)
def test_generators_share_the_stages_up_to_their_codes(name: str, tmp_path: Path) -> None:
    """By digest, each stage's config being the same: the tokenizer is trained once for all of them."""
    draw_images(tmp_path, 22)
    shared, own = (
        StageJob(RECIPES[each](), Store("store"), str(tmp_path), WorkerOptions())
        for each in ("imagenet256_sftok_b", name)
    )
    for stage in STAGES_TO_CODES:
        assert plan_of(stage, own, {}).digest == plan_of(stage, shared, {}).digest, stage.name
    other = StageJob(RECIPES["imagenet256_sftok_l"](), Store("store"), str(tmp_path), WorkerOptions())
    assert plan_of(graph.WARM_UP, own, {}).digest != plan_of(graph.WARM_UP, other, {}).digest
    is_same = plan_of(graph.TRAIN_GENERATOR, own, {}).digest == plan_of(graph.TRAIN_GENERATOR, shared, {}).digest
    assert is_same == (name == "imagenet256_ar_b")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_called_as_it_is_named_and_says_what_it_claims(name: str) -> None:
    assert RECIPES[name]().name == name
    about = RECIPES[name].__doc__ or ""
    if name in {*GENERATORS, *PUBLISHED}:
        assert f"`sftok run {name} --data DIR" in about
        assert re.search(r"[Nn]ot (been )?trained here", " ".join(about.split()))
        assert "Published:" in about


def test_losses_without_weights_are_refused_one_by_one() -> None:
    given = {
        "teacher.pretrained.sha256": "teacher.pretrained.uri",
        "fine_tune.lpips.sha256": "fine_tune.perceptual_weight=0",
        "fine_tune.adversarial.dino.sha256": "fine_tune.adversarial.weight=0",
    }
    overrides: list[str] = []
    for field, remedy in given.items():
        with pytest.raises(ValueError, match=remedy.replace(".", r"\.")):
            check_weights(load_recipe("imagenet256_sftok_b", overrides=overrides))
        overrides.append(f"{field}={WEIGHTS}")
    check_weights(load_recipe("imagenet256_sftok_b", overrides=overrides))


@pytest.mark.parametrize(("micro_batch", "is_fine"), [(8, True), (16, True), (9, False), (4, True), (10, True)])
def test_a_batch_that_the_local_norm_cannot_divide_is_refused_when_read(micro_batch: int, is_fine: bool) -> None:
    overrides = ["fine_tune.training.batch_size=720", f"fine_tune.training.micro_batch={micro_batch}"]
    if is_fine:
        load_recipe("imagenet256_sftok_b", overrides=overrides)
        return
    with pytest.raises(ValueError, match=r"fine_tune: training.micro_batch = 9: the DINO discriminator's local batch"):
        load_recipe("imagenet256_sftok_b", overrides=overrides)


def test_images_that_a_discriminator_cannot_take_are_refused_before_the_run() -> None:
    recipe = load_recipe(
        "digits",
        overrides=[
            "fine_tune.adversarial.weight=0.1",
            "fine_tune.adversarial.kind=patch",
            "fine_tune.adversarial.start_step=10",
            "fine_tune.adversarial.layers=5",
        ],
    )
    with pytest.raises(ValueError, match=r"fine_tune\.adversarial: .*32"):
        check_weights(recipe)


def test_a_discriminator_that_never_begins_is_refused() -> None:
    with pytest.raises(ValueError, match=r"start_step = 20000 is not below training\.steps = 350"):
        load_recipe("digits", overrides=["fine_tune.adversarial.weight=0.1"])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["generator.widht=3"], "generator.widht: unknown field, did you mean width?"),
        (
            ["generator.order.kind=fixed", "generator.order.sed=3"],
            "generator.order.sed: unknown field, did you mean seed?",
        ),
        (["generator.kind=nope"], "generator.kind = 'nope': give 'autoregressive' or 'masked'"),
        (["generator=3"], "generator = 3: give a section with a kind, generator.kind"),
        (["a=1", "b=2", "c=3", "d=4", "e=5"], "a: unknown field; b: unknown field; c: unknown field; and 2 more"),
    ],
)
def test_problems_are_named_as_a_recipe_writes_them_and_not_all_at_once(overrides: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(f'recipe digits: {said}')}$"):
        load_recipe("digits", overrides=overrides)
