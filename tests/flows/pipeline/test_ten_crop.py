"""Ten crops from the recipe to the generator's training data: part of what is computed, and all of them there."""

import pytest

from flows.pipeline import graph
from flows.recipes.files import load_recipe, to_toml
from flows.recipes.registry import RECIPES
from flows.recipes.schema import EncodeConfig
from flows.stage import plan_of
from flows.store.verify import verify as verify_command
from generator.data import CodeData
from infra.artifacts.manifest import ArtifactRef, files_of, key_of, manifest_of
from infra.artifacts.shards import split_of
from infra.codes.contract import read_codes
from infra.store.store import Store
from sftok.images.views import CROPS, TEN_CROP_RESIZE
from tests.support.small_dataset import Made, draw_images

TEN = 'encode.variants=["center", "ten_crop"]'
REF = ArtifactRef(kind="images", digest="0" * 32, uri="")


def test_codes_of_ten_crops_are_proven_and_mixed(tmp_path) -> None:
    draw_images(tmp_path / "source")
    store = Store(tmp_path / "store")
    made = Made(store, tmp_path / "source", TEN)
    images = made.run(graph.PREPARE)
    codes = made.run(graph.ENCODE, images=images, tokenizer=made.tokenizer(0))
    manifest, counts = manifest_of(store, codes), manifest_of(store, images).counts
    assert manifest.counts["rows"] == 11 * counts["train"] + counts["val"]
    assert verify_command(str(codes), store=store.uri).ok
    keys = [key_of(manifest, file) for file in files_of(store, manifest) if split_of(file.path) == "train"]
    rows = read_codes(store, keys)[1]
    assert {view: rows.variant.count(view) for view in set(rows.variant)} == dict.fromkeys(
        ("center", *CROPS), counts["train"]
    )
    assert len(CodeData.of(rows).codes) == 11 * counts["train"]


def plan(tmp_path, *overrides: str) -> str:
    made = Made(Store(tmp_path), tmp_path, *overrides)
    return plan_of(graph.ENCODE, made.job, {"images": REF}).digest


def test_the_resize_decides_codes_only_where_there_are_crops(tmp_path) -> None:
    plain, ten, wider = plan(tmp_path), plan(tmp_path, TEN), plan(tmp_path, TEN, "encode.ten_crop_resize=1.2")
    assert len({plain, ten, wider}) == 3
    assert plan(tmp_path, TEN, f"encode.ten_crop_resize={TEN_CROP_RESIZE}") == ten
    for recipe in RECIPES.values():
        stated = recipe().encode.identity()
        assert ("ten_crop_resize" in stated) == recipe().encode.has_crops
    assert EncodeConfig().on("cpu", width=1).identity() == {
        "variants": ["center"],
        "val_variants": ["center"],
        "assignment": "nearest",
        "precision": "fp32",
        "micro_batch": 64,
    }


def test_ten_crop_in_a_recipe_is_written_out_and_read_back(tmp_path) -> None:
    recipe = load_recipe("digits_tiny", overrides=[TEN, "encode.ten_crop_resize=1.3"])
    assert recipe.encode.variants == ("center", *CROPS)
    (tmp_path / "mine.toml").write_text(to_toml(recipe))
    assert load_recipe(str(tmp_path / "mine.toml")) == recipe
    assert type(recipe).model_validate_json(recipe.model_dump_json()) == recipe
    (tmp_path / "plain.toml").write_text(to_toml(load_recipe("digits_tiny")))
    assert load_recipe(str(tmp_path / "plain.toml")) == load_recipe("digits_tiny")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["encode.ten_crop_resize=1.2"], r"encode: ten_crop_resize = 1\.2 changes nothing: name ten_crop as a view"),
        (['encode.variants=["ten_crop", "crop-3"]'], "names a view twice"),
        ([TEN, "encode.ten_crop_resize=1.01"], r"ten_crop_resize = 1\.01 leaves crops of 32 pixels no room"),
        ([TEN, "encode.ten_crop_resize=1"], r"encode\.ten_crop_resize = 1: input should be greater than 1"),
    ],
)
def test_mistakes_are_refused(overrides, said) -> None:
    with pytest.raises(ValueError, match=said):
        load_recipe("digits_tiny", overrides=overrides)
