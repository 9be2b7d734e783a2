"""`sftok diff` against codes whose differences are known, and against those of two real tokenizers."""

import json
import math

import numpy as np
import pytest
import torch

from flows.cli.main import main
from flows.pipeline import graph
from flows.store.diff.agreement import drift, frequencies
from flows.store.diff.diff import diff
from infra.artifacts.manifest import ArtifactPlan, ArtifactRef, folder_of, publish, ref_of
from infra.artifacts.shards import put, shard_name
from infra.artifacts.verify import bucket_of
from infra.codes.contract import NO_CLASS, CodeRows, CodesInfo, from_parquet, to_parquet
from infra.store.store import Store
from sftok.metrics.functional import code_counts, codebook_usage, entropy_bits, perplexity
from tests.support.codes_info import codes_info
from tests.support.small_dataset import Made, draw_images

INFO = codes_info(50, 4, tokenizer="0" * 32, class_names=None)
IMAGES = ArtifactRef(kind="images", digest="1" * 32, uri="/elsewhere", content_digest="c" * 32)

Codes = dict[tuple[str, str], list[int]]


def draw(count: int, seed: int, info: CodesInfo = INFO) -> Codes:
    random = np.random.default_rng(seed)
    codes = random.integers(0, info.codebook_size, (count, 2, info.num_tokens)).tolist()
    return {(f"{i:03d}", variant): codes[i][v] for i in range(count) for v, variant in enumerate(("center", "flip"))}


def dataset(
    store: Store, codes: Codes, *, shards: int = 3, tokenizer: str = "a", images: ArtifactRef = IMAGES, info=INFO
) -> ArtifactRef:
    """A code dataset in the buckets of its image ids."""
    inputs = {"images": images, "tokenizer": ArtifactRef(kind="tokenizer", digest=tokenizer * 32, uri="")}
    plan = ArtifactPlan(kind="codes", version=1, config={"shards": shards, "some": sorted(codes)[0][0]}, inputs=inputs)
    folder, files = folder_of(store, plan.kind, plan.digest), []
    info = info.model_copy(update={"tokenizer": tokenizer * 32})
    for index in range(shards):
        keys = [key for key in codes if bucket_of(key[0], shards) == index]
        rows = CodeRows(
            [image_id for image_id, _ in keys],
            np.full(len(keys), NO_CLASS, np.int32),
            [variant for _, variant in keys],
            np.array([codes[key] for key in keys], info.dtype).reshape(-1, info.num_tokens),
        )
        files.append(put(folder, shard_name("train", index, shards), to_parquet(info, rows), len(keys)))
    return ref_of(store, publish(store, plan, files=files, counts={}, metrics={}, seconds=0))


def changed(codes: Codes) -> Codes:
    """Image 001 keeps no code; in the flip of 002 the last position differs."""
    new = {key: list(row) for key, row in codes.items()}
    for variant in ("center", "flip"):
        new["001", variant] = [(code + 1) % INFO.codebook_size for code in new["001", variant]]
    new["002", "flip"][3] = (new["002", "flip"][3] + 1) % INFO.codebook_size
    return new


def numbers(codes: Codes) -> torch.Tensor:
    return torch.tensor(list(codes.values()))


def test_differences_are_found_where_they_were_made(store):
    old = draw(40, seed=0)
    new = changed(old)
    made = diff(str(dataset(store, old)), str(dataset(store, new, tokenizer="b")), store=store.uri, worst=3)
    assert made.images == {"both": 40, "only_before": 0, "only_after": 0}
    assert made.views == {"both": 80, "only_before": 0, "only_after": 0}
    assert made.settings == {"tokenizer": ("a" * 32, "b" * 32)}
    assert made.same_images
    agreement = made.agreement
    assert agreement is not None
    assert agreement.per_position == (78 / 80, 78 / 80, 78 / 80, 77 / 80)
    assert agreement.codes == pytest.approx(1 - 9 / 320)
    assert agreement.views_all_equal == 77 / 80
    assert agreement.images_all_equal == 38 / 40
    assert agreement.worst == (("001", 0.0), ("002", 7 / 8), ("000", 1.0))


def test_figures_of_the_codebook_are_those_of_the_metrics(store):
    old, new = draw(40, seed=0), draw(40, seed=1)
    made = diff(str(dataset(store, old)), str(dataset(store, new, tokenizer="b")), store=store.uri)
    for figures, codes in zip(made.frequencies, (old, new), strict=True):
        counts = code_counts(numbers(codes), 50)
        assert figures.usage == codebook_usage(counts)
        assert figures.entropy_bits == pytest.approx(entropy_bits(counts))
        assert figures.perplexity == pytest.approx(perplexity(counts))
    assert made.agreement is not None
    assert made.agreement.chance == pytest.approx(1 / 50, abs=0.01)
    assert abs(made.agreement.codes - made.agreement.chance) < 0.03


def test_drift_has_the_values_that_a_pencil_gives():
    one, other = np.array([5, 0, 0]), np.array([0, 2, 2])
    assert drift(one, other) == (1.0, 1.0, 1.0)
    assert drift(one, 3 * one) == (0.0, 0.0, 0.0)
    half = drift(np.array([4, 0]), np.array([2, 2]))  # entropy of (3/4, 1/4), less half a bit
    expected = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)) - 0.5
    assert half.js_divergence_bits == pytest.approx(expected)
    assert half.js_distance == pytest.approx(math.sqrt(expected))
    assert half.total_variation == 0.5
    assert frequencies(np.array([1, 1, 0, 2])) == (0.75, 1.5, 2.0**1.5)


@pytest.mark.parametrize("shards", [1, 5])
def test_other_buckets_give_the_same_figures(store, shards):
    old, new = draw(60, seed=0), changed(draw(60, seed=0))
    first, second = dataset(store, old), dataset(store, new, tokenizer="b")
    again = dataset(store, new, tokenizer="b", shards=shards)
    assert str(second) != str(again)
    one = diff(str(first), str(second), store=store.uri)
    other = diff(str(first), str(again), store=store.uri)
    assert one._replace(after="") == other._replace(after="")


def test_images_that_moved_between_equal_names_are_found_again(store):
    """Guards against trusting names where the images are others: an image may be train here and val there."""
    old = draw(30, seed=0)
    first = dataset(store, old)
    elsewhere = IMAGES.model_copy(update={"content_digest": "d" * 32})
    moved = dataset(store, {("x" + image_id, view): codes for (image_id, view), codes in old.items()}, images=elsewhere)
    folder = folder_of(store, "codes", moved.digest)
    shards = [from_parquet(folder_of(store, "codes", first.digest).read(shard_name("train", i, 3))) for i in range(3)]
    for index, (info, rows) in enumerate(shards):
        folder.write(shard_name("train", (index + 1) % 3, 3), to_parquet(info, rows))
    made = diff(str(first), str(moved), store=store.uri)
    assert made.views["both"] == 60
    assert made.agreement is not None
    assert made.agreement.codes == 1
    assert not made.same_images


def test_images_in_one_only_are_counted_and_not_compared(store):
    codes = draw(30, seed=0)
    old = {key: row for key, row in codes.items() if key[0] != "000"}
    new = {key: row for key, row in codes.items() if key[0] < "020" and key != ("001", "flip")}
    made = diff(str(dataset(store, old)), str(dataset(store, new, tokenizer="b")), store=store.uri)
    assert made.images == {"both": 19, "only_before": 10, "only_after": 1}
    assert made.views == {"both": 37, "only_before": 21, "only_after": 2}
    assert made.agreement is not None
    assert made.agreement.codes == 1
    other = {("z" + image_id, view): row for (image_id, view), row in codes.items()}
    assert diff(str(dataset(store, old)), str(dataset(store, other)), store=store.uri).agreement is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"codebook_size": 60}, "codebook_size is 50 and 60"), ({"num_tokens": 5}, "num_tokens is 4 and 5")],
)
def test_other_vocabularies_are_refused_and_usage_still_compared(store, changes, said):
    info = INFO.model_copy(update=changes)
    first, second = dataset(store, draw(9, 0)), dataset(store, draw(9, 1, info), tokenizer="b", info=info)
    with pytest.raises(ValueError, match=f"{said} in .* usage, entropy and perplexity can: add --usage"):
        diff(str(first), str(second), store=store.uri)
    made = diff(str(first), str(second), store=store.uri, usage_only=True)
    assert made.agreement is None
    assert made.drift is None
    assert made.frequencies[1].usage == codebook_usage(code_counts(numbers(draw(9, 1, info)), info.codebook_size))


# --- tokenizers, stale generators, the command -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Made, dict[str, ArtifactRef]]:
    place = tmp_path_factory.mktemp("made")
    draw_images(place / "source")
    made = Made(Store(place / "store"), place / "source")
    refs = {"images": made.run(graph.PREPARE), "one": made.tokenizer(0), "two": made.tokenizer(1)}
    for name in ("one", "two"):
        refs[f"codes_{name}"] = made.run(graph.ENCODE, images=refs["images"], tokenizer=refs[name])
    refs["generator"] = made.generator(refs["codes_one"])
    return made, refs


@pytest.fixture
def sftok(capsys):
    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return ended.value.code, printed.out, printed.err

    return run


def test_two_tokenizers_are_compared_by_the_codes_of_the_same_images(made, sftok):
    store, refs = made[0].store, made[1]
    code, out, err = sftok("diff", refs["one"], refs["two"], "--store", store.uri, "--json", "--worst", "2")
    assert code == 0, err
    result = json.loads(out)
    assert (result["before"], result["after"]) == (str(refs["codes_one"]), str(refs["codes_two"]))
    assert result["images"] == {"both": 20, "only_before": 0, "only_after": 0}
    assert len(result["agreement"]["per_position"]) == 16
    assert len(result["agreement"]["worst"]) == 2
    assert result["stale_generators"] == [str(refs["generator"])]
    assert "diff, shards: 5/5" in err, "no progress"


def test_the_page_for_people_says_the_same(made, sftok):
    store, refs = made[0].store, made[1]
    code, out, _ = sftok("diff", refs["codes_two"], refs["codes_one"], "--store", store.uri)
    assert code == 0
    assert "images: 20 in both, 0 only before, 0 only after" in out
    assert "Jensen-Shannon divergence, bits" in out
    assert "a/00.png" in out
    assert "stale" not in out, "the generator was trained on the codes after"


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("codes_one", "two", "name two code datasets, or two tokenizers"),
        ("images", "images", "name two code datasets, or two tokenizers"),
        ("one", "generator", "name two code datasets, or two tokenizers"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_a_line(made, sftok, before, after, said):
    store, refs = made[0].store, made[1]
    code, out, err = sftok("diff", refs[before], refs[after], "--store", store.uri)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err


def test_tokenizers_without_codes_of_the_same_images(made, sftok):
    third = made[0].tokenizer(2)
    code, _, err = sftok("diff", made[1]["one"], third, "--store", made[0].store.uri)
    assert (code, err.count("\n")) == (2, 1)
    assert f"before: {made[1]['codes_one'].digest[:12]}; after: none" in err
